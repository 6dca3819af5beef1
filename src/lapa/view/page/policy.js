// The page of a policy: an observation, and what the policy predicts for it.
"use strict";
// Codes of a position that are shown, the most probable ones.
const TOP = 6;
let about = null;
// What was recorded after the example: actions, and the image one horizon later with its codes.
let truth = {};
const images = {}, zones = {};

async function predict() {
  const missing = about.cameras.filter(camera => !images[camera]);
  if (missing.length) throw new Error(`there is no image of ${missing.join(", ")}; give one`);
  const given = { images, instruction: $("instruction").value };
  if (about.state) given.state = [...$("state").querySelectorAll("input")].map(field => Number(field.value));
  if (about.statistics.length > 1) given.statistics = $("statistics").value;
  $("status").textContent = "predicting";
  const begun = performance.now();
  try {
    show(await ask("predict", given));
    $("status").textContent = `${short((performance.now() - begun) / 1000)} s`;
  } catch (error) {
    $("status").textContent = "";
    throw error;
  }
}
function show(found) {
  $("latent").hidden = !found.codes;
  if (found.codes) showLatent(found);
  $("actions").hidden = !found.actions;
  if (found.actions) showActions(found.actions);
  showBins(found.bins ?? []);
}
function showLatent({ codes, shares, decoded }) {
  const { lam, fingerprint } = about, later = truth.recorded;
  const known = fingerprint ? ` (${fingerprint})` : "";
  $("latent-about").textContent = `${codes.join("-")}. ` + (lam ? `Decoded by ${lam.name}, from the image of `
    + `${about.cameras[0]}. ${heatScale(decoded.most)}`
    : `The model of these latent actions${known} shows them as an image: lapa view POLICY --lam LAM.`);
  $("shots").replaceChildren(...(decoded ? [shot(decoded.before, "image, as the model reads it"),
    shot(decoded.image, `predicted ${short(lam.seconds)} s later`), shot(decoded.difference, "difference of these two"),
    ...(later ? [shot(later.image, `true frame, whose codes are ${later.codes.join("-")}`)] : [])] : []));
  $("shares").replaceChildren(...shares.map((all, position) => {
    const best = [...all.keys()].sort((one, other) => all[other] - all[one]).slice(0, TOP);
    const bars = best.flatMap(code => {
      const bar = make("i");
      bar.style.width = `${100 * all[code]}%`;
      return [make("span", { textContent: `code ${code}`, className: code === codes[position] ? "chosen" : "" }),
        make("div", {}, bar), make("span", { className: "value", textContent: percent(all[code]) })];
    });
    const box = make("figure", {}, make("figcaption", {}, make("b", { textContent: `position ${position + 1}` })),
      make("div", { className: "z" }, ...bars));
    return box;
  }));
}
// One dimension over the chunk; the recorded actions as a broken line.
function showActions(actions) {
  const { names, fps, chunk, control } = about.acts, recorded = truth.actions ?? [];
  const rate = fps ? ` at ${few.format(fps)} a second` : "";
  $("actions-about").textContent = `${chunk} x ${names.length} actions${rate}${control ? `, ${control} control` : ""}; the first `
    + `one in numbers${recorded.length ? ". Broken lines are what was recorded" : ""}.`;
  $("curves").replaceChildren(...names.map((name, dimension) => {
    const mine = actions.map(row => row[dimension]), true_ = recorded.map(row => row[dimension]);
    const low = Math.min(...mine, ...true_), high = Math.max(...mine, ...true_), last = Math.max(1, chunk - 1);
    const y = value => 94 - 88 * (high > low ? (value - low) / (high - low) : 0.5);
    const graph = drawn("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img",
      "aria-label": `${name}: ${mine.map(short).join(", ")}` });
    if (low < 0 && high > 0) graph.append(drawn("line", { class: "zero", x1: 0, x2: 1000, y1: y(0), y2: y(0) }));
    const line = (values, kind) => {
      // A single action is a line across.
      const points = (values.length > 1 ? values : [...values, ...values]).map((value, step, all) =>
        `${values.length > 1 ? 1000 * step / last : 1000 * step / (all.length - 1)},${y(value)}`);
      return drawn("polyline", { class: kind, points: points.join(" ") });
    };
    if (true_.length) graph.append(line(true_, "curve recorded"));
    graph.append(line(mine, "curve"));
    const numbers = short(mine[0]) + (true_.length ? ` (${short(true_[0])})` : "");
    return make("figure", {}, make("figcaption", {}, make("b", { textContent: name }),
      make("span", { className: "value", textContent: numbers, title: "the first action, and the recorded one" })),
    make("div", { className: "lane" }, graph));
  }));
}
// The probabilities of the bins of the first action, from the lowest value to the highest.
function showBins(bins) {
  const charts = bins.map(({ values, shares }, dimension) => {
    const most = Math.max(...shares), best = shares.indexOf(most), name = about.acts.names[dimension];
    const text = `${percent(most)} for ${short(values[best])}`;
    const graph = drawn("svg", { viewBox: `0 0 ${shares.length} 100`, preserveAspectRatio: "none", role: "img",
      "aria-label": `${name}: ${text}` });
    // Of many bins one would be too thin to see.
    const width = Math.max(0.9, shares.length / 70);
    shares.forEach((share, bin) => graph.append(drawn("rect", { x: bin + 0.5 - width / 2, width, height: 96 * share / (most || 1),
      y: 100 - 96 * share / (most || 1), class: bin === best ? "bar best" : "bar" })));
    return make("figure", {}, make("figcaption", {}, make("b", { textContent: name }),
      make("span", { className: "value", textContent: text })), make("div", { className: "lane" }, graph),
    make("figcaption", {}, make("span", { textContent: short(values[0]) }), make("span", { textContent: short(values.at(-1)) })));
  });
  $("bins").replaceChildren(...(charts.length ? [make("h3", { textContent: "Probabilities of the bins of the first action, from"
    + " its lowest value to its highest" }), make("div", { className: "curves" }, ...charts)] : []));
}
const chooseExample = number => queued(async () => {
  const example = await load(`example-${number}`);
  [...$("examples").children].forEach((each, place) => each.setAttribute("aria-pressed", place === number));
  Object.assign(images, example.images);
  for (const camera of about.cameras) zones[camera].show(images[camera]);
  $("instruction").value = example.instruction;
  [...$("state").querySelectorAll("input")].forEach((field, place) => { field.value = example.state[place]; });
  if (about.statistics.includes(about.dataset)) $("statistics").value = about.dataset;
  truth = example;
  if (exported) show(example.predicted);
  else await predict();
});
function changed() {
  truth = {};
  for (const each of $("examples").children) each.setAttribute("aria-pressed", false);
}
// Several pasted numbers go to this field and those after it.
function pasted(event, fields, first) {
  const numbers = event.clipboardData.getData("text").split(/[\s,;[\]()]+/).filter(Boolean);
  if (numbers.length < 2 || numbers.some(number => !Number.isFinite(Number(number)))) return;
  event.preventDefault();
  numbers.forEach((number, place) => { if (fields[first + place]) fields[first + place].value = number; });
}

guarded(async () => {
  about = await load("about");
  document.title = `${about.name} · lapa view`;
  $("title").textContent = about.name;
  $("about").textContent = [about.acts ? "policy" : "pretrained policy, without robot actions", about.about,
    about.dataset ? `example observations of ${about.dataset}` : ""].filter(Boolean).join(" · ");
  for (const camera of about.cameras) {
    zones[camera] = dropZone(camera, exported ? "" : "drop an image here, or choose a file", address => {
      images[camera] = address;
      changed();
    });
  }
  $("drops").replaceChildren(...Object.values(zones));
  $("examples").replaceChildren(...exampleButtons(about.examples, chooseExample));
  for (const button of $("examples").children) button.type = "button";
  $("statistics-set").hidden = about.statistics.length < 2;
  $("statistics").replaceChildren(...about.statistics.map(name => make("option", { textContent: name })));
  $("state-set").hidden = !about.state;
  const fields = Array.from({ length: about.state }, (_, place) => make("input", { type: "number", step: "any", value: 0,
    required: true, onpaste: event => pasted(event, fields, place) }));
  $("state").replaceChildren(...fields.map((field, place) => make("label", { textContent: place }, field)));
  for (const element of $("observation").querySelectorAll("input, select")) element.disabled = exported;
  $("predict").hidden = exported;
  $("observation").onsubmit = event => { event.preventDefault(); queued(predict); };
  if (about.examples.length) await chooseExample(0);
})();
