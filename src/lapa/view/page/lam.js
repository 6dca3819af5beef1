// The page of latent action models: press codes, and see what the decoder predicts.
"use strict";
// More codes than this at a position are chosen in a field.
const MOST_BUTTONS = 64;
let about = null, models = [], active = 0;

const written = action => action.codes ? action.codes.join("-") : `video, step ${action.step + 1}`;
const steps = () => models[0].film.length - 1;
// What the frames of the video say about the step to come; undefined past their end.
function ofVideo(model, step) {
  const { frames, codes } = model.clip;
  if (step >= frames.length - 1) return undefined;
  return model.about.discrete ? { codes: codes[step] } : { pair: frames.slice(step, step + 2), step };
}

// Starts anew from an image. clips: for each model its frames, and the codes between them.
async function start(clips) {
  models.forEach((model, number) => {
    model.clip = clips[number];
    model.film = [{ image: model.clip.frames[0] }];
    model.each = null;
    const { length, codebook, discrete } = model.about;
    model.action = ofVideo(model, 0) ?? (discrete ? { codes: Array(length).fill(codebook >> 1) } : null);
  });
  $("controls").hidden = false;
  $("models").hidden = false;
  show();
  if (models.every(model => ofVideo(model, 0))) await take(models.map(model => ofVideo(model, 0)));
}
async function working(work) {
  const before = $("state").textContent;
  $("state").textContent = "predicting";
  try {
    await work();
  } finally {
    $("state").textContent = before;
  }
}
// Applies an action of each model, so that all are at the same step.
async function take(actions) {
  if (actions.some(action => !action)) throw new Error("there is no latent action to apply; give a later image");
  let films = models.map(model => model.film), made = [];
  await working(async () => {
    made = await allPredicted(films, actions);
    // Where an export lacks the next step of one model, all begin again with the image.
    if (made.includes(null)) {
      films = films.map(film => film.slice(0, 1));
      made = await allPredicted(films, actions);
    }
  });
  models.forEach((model, number) => {
    model.film = [...films[number], { ...made[number], action: actions[number] }];
    model.action = actions[number];
    if (!exported) model.each = null;
  });
  show();
}
async function allPredicted(films, actions) {
  const made = [];
  for (const [number, action] of actions.entries()) made.push(await predicted(models[number], films[number], action));
  return made;
}
// What a model predicts after a film; null where an export has the action only from the image on.
async function predicted(model, film, action) {
  if (!exported) return ask("step", { model: model.number, image: film.at(-1).image, ...action });
  const taken = film.slice(1).map(each => written(each.action)), wanted = written(action), step = taken.length;
  const video = model.clip.replay.map((each, place) => written(ofVideo(model, place)));
  if (wanted === video[step] && taken.every((each, place) => each === video[place])) return model.clip.replay[step];
  const place = model.each?.actions.findIndex(codes => codes.join("-") === wanted) ?? -1;
  if (place < 0) throw new Error(`this page has only some latent actions, and ${wanted} is none of them`);
  if (!taken.every(each => each === wanted)) return null;
  if (step >= model.each.steps.length) throw new Error(`this page applies a code ${model.each.steps.length} times at most`);
  return model.each.steps[step][place];
}
function press(model, position, code) {
  const { codebook } = model.about;
  active = model.number;
  model.position = position;
  queued(() => {
    // An export has each code with the others as the video has them.
    const codes = [...(exported ? model.each?.base ?? model.action.codes : model.action.codes)];
    codes[position] = (code + codebook) % codebook;
    return take(models.map(each => each === model ? { codes } : each.action));
  });
}
const again = () => queued(() => take(models.map(model => model.action)));
const undo = () => queued(() => back(Math.max(0, steps() - 1)));
function back(to) {
  // Fewer may be left by now.
  const step = Math.min(to, steps());
  for (const model of models) {
    model.film.length = step + 1;
    model.action = model.film[step].action ?? ofVideo(model, 0) ?? model.action;
    if (!exported) model.each = null;
  }
  show();
}
const random = () => queued(() => take(models.map(model => {
  const { length, codebook, discrete } = model.about, among = exported && model.each?.actions;
  if (!discrete) throw new Error("a continuous model has no codes to draw");
  if (among) return { codes: among[Math.floor(Math.random() * among.length)] };
  return { codes: Array.from({ length }, () => Math.floor(Math.random() * codebook)) };
})));
const replay = () => queued(async () => {
  const long = Math.min(...models.map(model => model.clip.frames.length - 1));
  if (!long) throw new Error("there is no later frame; give a later image");
  back(0);
  for (let step = 0; step < long; step++) {
    await take(models.map(model => ofVideo(model, step)));
    if (!calm) await new Promise(done => setTimeout(done, 300));
  }
});
const showEach = model => queued(async () => {
  const given = { model: model.number, image: model.film.at(-1).image, codes: model.action.codes };
  await working(async () => { model.each = await ask("each", given); });
  show();
});

function show() {
  const num = steps();
  $("state").textContent = models.map(model => `${num} step${num === 1 ? "" : "s"}, ${short(num * model.about.seconds)} s`)
    .filter((text, place, all) => all.indexOf(text) === place).join("; ");
  $("undo").disabled = $("reset").disabled = num === 0;
  $("again").disabled = models.some(model => !model.action);
  $("replay").hidden = models.some(model => model.clip.frames.length < 2);
  $("random").hidden = models.some(model => !model.about.discrete);
  for (const model of models) {
    showShots(model);
    if (model.about.discrete) showCodes(model);
    showFilm(model);
  }
}
function showShots(model) {
  const num = model.film.length - 1, last = model.film[num], truth = model.clip.frames[num];
  const { seconds } = model.about, shots = [];
  if (num === 0) shots.push(shot(last.image, "image, as the model reads it"));
  else {
    shots.push(shot(model.film[num - 1].image, num === 1 ? "image" : `predicted, step ${num - 1}`),
      shot(last.image, `predicted ${short(seconds)} s later by ${written(last.action)}`),
      shot(last.difference, "difference of these two"));
    if (truth) shots.push(shot(truth, `true frame, ${short(num * seconds)} s after the first`));
  }
  model.shots.replaceChildren(...shots);
  const read = ofVideo(model, Math.max(0, num - 1));
  model.note.textContent = [read?.codes && num ? `The encoder reads ${written(read)} from the frames of this step.` : "",
    last.most ? heatScale(last.most) : ""].filter(Boolean).join(" ");
}
function showCodes(model) {
  const { length, codebook } = model.about, now = model.action.codes, num = model.film.length - 1;
  const read = ofVideo(model, Math.max(0, num - 1))?.codes, focus = document.activeElement?.id;
  const made = new Map((model.each?.actions ?? []).map((codes, place) => [codes.join("-"), place]));
  model.codes.replaceChildren(...Array.from({ length }, (_, position) => {
    const row = make("div", { className: "codes" });
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", `position ${position + 1}`);
    row.classList.toggle("chosen", model.number === active && model.position === position);
    const every = codebook <= MOST_BUTTONS;
    const shown = every ? Array.from({ length: codebook }, (_, code) => code) : drawnCodes(model, position);
    const parts = shown.map(code => {
      const button = make("button", { id: `code-${model.number}-${position}-${code}`,
        onclick: () => press(model, position, code) });
      const codes = [...(model.each?.base ?? now)];
      codes[position] = code;
      const place = made.get(codes.join("-"));
      if (place !== undefined) {
        const { image, difference } = model.each.steps[0][place];
        button.append(make("img", { src: image, alt: "" }), make("img", { src: difference, alt: "" }));
      }
      button.append(String(code));
      button.setAttribute("aria-pressed", now[position] === code);
      if (read?.[position] === code) {
        button.classList.add("read");
        button.title = "what the encoder reads from the frames";
      }
      return button;
    });
    if (!every) parts.unshift(make("input", { type: "number", min: 0, max: codebook - 1, value: now[position],
      id: `code-${model.number}-${position}`, ariaLabel: `code of position ${position + 1}`,
      onchange: event => press(model, position, Math.min(codebook - 1, Math.max(0, Number(event.target.value)))) }));
    row.append(make("span", { textContent: `position ${position + 1}` }), ...parts);
    return row;
  }));
  if (focus?.startsWith(`code-${model.number}-`)) $(focus)?.focus();
  model.what.hidden = exported || Boolean(model.each);
}
// Codes of a position whose effect was asked for, the other positions as they are.
function drawnCodes(model, position) {
  const { base, actions } = model.each ?? { base: [], actions: [] };
  const alone = actions.filter(codes => codes.every((code, place) => place === position || code === base[place]));
  return [...new Set(alone.map(codes => codes[position]))].sort((one, other) => one - other);
}
function showFilm(model) {
  model.film_.replaceChildren(...model.film.map((each, step) => {
    const text = step ? written(each.action) : "image", truth = model.clip.frames[step];
    const button = make("button", { title: `back to step ${step}`, onclick: () => queued(() => back(step)) },
      make("img", { src: each.image, alt: step ? `predicted, step ${step}` : "image" }));
    if (truth && step) button.append(make("img", { src: truth, alt: `true frame, step ${step}` }));
    button.append(make("span", { textContent: text }));
    button.setAttribute("aria-pressed", step === model.film.length - 1);
    return button;
  }));
}
function card(model) {
  const { name, about: what, length, codebook, discrete, seconds } = model.about;
  Object.assign(model, { shots: make("div", { className: "shots" }), note: make("p", { className: "dim" }),
    codes: make("div"), film_: make("div", { className: "film" }), often: make("div"),
    what: make("button", { textContent: "Show what each code does from here", onclick: () => showEach(model) }) });
  const kind = discrete ? `${length} codes of ${codebook}` : "continuous latent actions";
  const parts = [make("h2", { textContent: name }),
    make("div", { className: "dim", textContent: `${kind} · ${short(seconds)} s ahead · ${what}` }), model.shots, model.note,
    make("h3", { textContent: "Steps, above the true frame where there is one; press one to go back to it" }), model.film_];
  if (discrete) parts.push(make("h3", { textContent: "Press a code: the image becomes what the model predicts. Framed in"
    + " green is what the encoder reads from the video" }), model.codes, make("p", {}, model.what), model.often);
  else parts.push(make("p", { className: "dim", textContent: "A continuous model has no codes to press: the latent action"
    + " of two frames is applied, again and again. Take an example, or give an image and a later one." }));
  const made = make("section", { className: "card" }, ...parts);
  made.addEventListener("focusin", () => { active = model.number; });
  made.setAttribute("aria-label", name);
  return made;
}
const showOften = guarded(async model => {
  const { actions, sample } = await load(`frequent-${model.number}`);
  if (!actions.length) return;
  model.often.replaceChildren(
    make("h3", { textContent: `The most frequent latent actions, of ${sample} pairs of ${about.dataset}` }),
    make("div", { className: "row" }, ...actions.map(({ codes, share }) => make("button", {
      textContent: `${codes.join("-")} ${percent(share)}`,
      onclick: () => queued(() => take(models.map(each => each === model ? { codes } : each.action))) }))));
});
const chooseExample = number => queued(async () => {
  const clips = (await load(`example-${number}`)).models;
  [...$("examples").children].forEach((each, place) => each.setAttribute("aria-pressed", place === number));
  for (const zone of $("drops").children) zone.show(null);
  dropped.fill(null);
  await start(clips);
  if (exported) for (const model of models) {
    if (model.about.discrete) model.each = await load(`each-${number}-${model.number}`);
  }
  show();
});
// The images that were dropped: one, or one and a later one.
const dropped = [null, null];
const drop = place => address => queued(async () => {
  dropped[place] = address;
  if (!dropped[0]) return;
  const clips = (await ask("image", { images: dropped.filter(Boolean) })).models;
  for (const each of $("examples").children) each.setAttribute("aria-pressed", false);
  await start(clips);
});

function listen() {
  $("again").onclick = again;
  $("random").onclick = random;
  $("replay").onclick = replay;
  $("undo").onclick = undo;
  $("reset").onclick = () => queued(() => back(0));
  addEventListener("keydown", event => {
    const model = models[active];
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input") || !model.film) return;
    const on = event.target.closest("button"), { discrete, length, codebook } = model.about;
    const now = () => model.action.codes[model.position];
    const move = by => { model.position = (model.position + by + length) % length; show(); };
    if (event.key === "Enter" && !on) again();
    else if (event.key === "Backspace") undo();
    else if (event.key === "Escape") queued(() => back(0));
    else if (event.key === "v") replay();
    else if (!discrete) return;
    else if (event.key === "r") random();
    else if (/^\d$/.test(event.key) && Number(event.key) < codebook) press(model, model.position, Number(event.key));
    else if (event.key === "ArrowUp") move(-1);
    else if (event.key === "ArrowDown") move(1);
    else if (event.key === "ArrowLeft") press(model, model.position, now() - 1);
    else if (event.key === "ArrowRight") press(model, model.position, now() + 1);
    else return;
    event.preventDefault();
  });
}

guarded(async () => {
  about = await load("about");
  models = about.models.map((each, number) => ({ about: each, number, position: 0 }));
  const names = models.map(model => model.about.name).join(" and ");
  document.title = `${names} · lapa view`;
  $("title").textContent = names;
  $("about").textContent = ["latent action model" + (models.length > 1 ? "s, in step" : ""),
    about.dataset ? `example images of ${about.dataset}` : "", exported ? "" : `on ${about.device}`].filter(Boolean).join(" · ");
  $("models").className = models.length > 1 ? "pair" : "stack";
  $("models").replaceChildren(...models.map(card));
  $("models").hidden = true;
  if (!exported) $("drops").replaceChildren(dropZone("Image", "drop one here, or choose a file", drop(0)),
    dropZone("Later image", "may be left out; shows the codes between the two", drop(1)));
  $("examples").replaceChildren(...exampleButtons(about.examples, chooseExample));
  listen();
  if (about.examples.length) await chooseExample(0);
  for (const model of models) await showOften(model);
})();
