// Codes: how often each occurs, its clips, and what follows it.
"use strict";
let position = 0, clips = [];
const positionName = number => number < about.labels.length ? `position ${number + 1}` : "whole action";
function drawCodes(code) {
  const names = about.labels.codes[position], usage = about.labels.usage[position], top = Math.max(...usage);
  $("positions").replaceChildren(...about.labels.codes.map((its, number) => {
    const button = make("button", { textContent: positionName(number), onclick: () => go(`codes-${number}`) });
    button.setAttribute("aria-pressed", number === position);
    return button;
  }));
  const order = [...names.keys()].sort((one, other) => usage[other] - usage[one]).slice(0, 64);
  if (names.length <= 64) order.sort((one, other) => one - other);
  $("usage").className = position < about.labels.length ? "bars" : "bars wholes";
  $("usage").replaceChildren(...order.map(number => {
    const bar = make("i");
    bar.style.height = `${56 * usage[number] / (top || 1)}px`;
    const button = make("button", { onclick: () => go(`code-${position}-${number}`) }, bar,
      make("b", { textContent: names[number] }), make("small", { textContent: percent(usage[number]) }));
    button.style.setProperty("--code", colour(number));
    button.setAttribute("aria-pressed", number === code);
    button.setAttribute("aria-label", `code ${names[number]}, ${percent(usage[number])}`);
    return button;
  }));
  drawMatrix(names);
}
function drawMatrix(names) {
  const table = about.labels.transitions[position], num = table.length, canvas = $("matrix");
  const cell = Math.max(6, Math.floor(380 / num)), label = num <= 16 && position < about.labels.length ? 22 : 0;
  canvas.width = canvas.height = label + num * cell;
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  pen.font = "13px sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  let best = [0, 0, 0], same = 0, total = 0;
  table.forEach((counts, row) => {
    const sum = counts.reduce((one, other) => one + other, 0);
    counts.forEach((count, column) => {
      total += count;
      if (row === column) same += count;
      if (count > best[2]) best = [row, column, count];
      pen.globalAlpha = sum ? count / sum : 0;
      pen.fillStyle = style.getPropertyValue("--mark");
      pen.fillRect(label + column * cell, label + row * cell, cell - 1, cell - 1);
    });
    pen.globalAlpha = 1;
    pen.fillStyle = style.getPropertyValue("--dim");
    if (label) {
      pen.fillText(names[row], label / 2, label + (row + 0.5) * cell);
      pen.fillText(names[row], label + (row + 0.5) * cell, label / 2);
    }
  });
  const text = total ? `${percent(same / total)} of the rows have the same code one horizon later. `
    + `Most frequent: ${names[best[0]]} → ${names[best[1]]} (${percent(best[2] / total)}).` : "No row has a successor.";
  canvas.setAttribute("aria-label", text);
  $("matrix-text").textContent = text;
  canvas.onpointermove = event => {
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
    const column = Math.floor(((event.clientX - box.left) * scale - label) / cell);
    const row = Math.floor(((event.clientY - box.top) * scale - label) / cell);
    const count = table[row]?.[column];
    if (count === undefined) return;
    const sum = table[row].reduce((one, other) => one + other, 0);
    $("matrix-text").textContent = `${names[row]} → ${names[column]}: ${count} times, `
      + `${percent(sum ? count / sum : 0)} of what follows ${names[row]}`;
  };
  canvas.onpointerleave = () => { $("matrix-text").textContent = text; };
}
async function showCode(code) {
  drawCodes(code);
  const wanted = `code-${position}-${code}`, isShown = latest("code");
  $("code").hidden = code === null;
  dropClips();
  if (code === null) return;
  $("code-title").textContent = `${positionName(position)}, code ${about.labels.codes[position][code]}`;
  $("code-count").textContent = "loading";
  const data = await load(wanted);
  if (!isShown() || location.hash.slice(1) !== wanted) return;
  $("code-count").textContent = `${data.rows.toLocaleString("en")} frames in ${data.episodes.toLocaleString("en")}`
    + ` episodes; each clip shows ${few.format(about.labels.seconds)} s from such a frame`;
  let shown = 0;
  const more = () => {
    addClips(data.clips.slice(shown, shown + 8));
    shown += 8;
    $("more").hidden = shown >= data.clips.length;
  };
  $("more").onclick = more;
  more();
  if (data.actions) {
    $("code-actions").append(make("h3", { textContent: "Mean action at these frames, and in brackets its distance from"
      + " the mean of all in standard deviations" }), distances(data.actions));
    addClips([data.nearest], $("code-nearest"));
    $("code-nearest").append(make("div", {}, make("h3", { textContent: "The one frame whose action is nearest to all of"
      + " these" }), distances(data.nearest.actions)));
  }
}
function distances(actions) {
  const widest = Math.max(1, ...actions.map(each => Math.abs(each.z)));
  return make("div", { className: "z" }, ...actions.flatMap(each => {
    const bar = make("i"), share = 50 * Math.abs(each.z) / widest;
    bar.style.width = `${share}%`;
    bar.style.left = `${each.z < 0 ? 50 - share : 50}%`;
    return [make("span", { textContent: each.name }), make("div", {}, bar),
      make("span", { className: "value", textContent: `${short(each.value)} (${each.z > 0 ? "+" : ""}${short(each.z)})` })];
  }));
}
function addClips(these, into = $("clips")) {
  for (const clip of these) {
    const video = make("video", { muted: true, playsInline: true, preload: "auto",
      src: `files/${clip.episode}-${clip.camera}.mp4` });
    video.onloadedmetadata = () => { video.currentTime = clip.start; if (running) video.play().catch(() => {}); };
    clips.push({ video, ...clip });
    const open = make("button", { onclick: () => go(`episode-${clip.episode}@${clip.frame}`) }, ...(about.images
      ? [video] : []), make("span", { className: "dim",
      textContent: `episode ${clip.episode}, frame ${clip.frame}: ${clip.instruction || "(no instruction)"}` }));
    into.append(open);
  }
}
function dropClips() {
  for (const { video } of clips) video.removeAttribute("src");
  clips = [];
  for (const id of ["clips", "code-actions", "code-nearest"]) $(id).replaceChildren();
}
let running = !calm;
function repeat() {
  for (const { video, start, end } of clips) {
    if (running && !video.seeking && video.readyState > 1 && (video.ended || video.currentTime >= end)) {
      video.currentTime = start;
      video.play().catch(() => {});
    }
  }
  requestAnimationFrame(repeat);
}
