// Rollouts: all outcomes at a glance, and the videos of the same episode by several arms, which play in step.
"use strict";
let data = null, rows = [], first = 0, now = 0;
const STEP = 0.1;
const outcomeOf = (arm, row) => data.success[arm][row] === null ? "not played"
  : `${data.success[arm][row] ? "success" : "failure"} after ${data.steps[arm][row]} steps`;
const titleOf = row => `${data.task[row]}, episode ${data.episode[row]}`
  + ((data.severalSeeds ??= new Set(data.seed).size > 1) ? `, seed ${data.seed[row]}` : "");
const perPage = () => data.arms.length > 1 ? 4 : 8;

function fill(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map(([value, text]) => make("option", { value, textContent: text })));
  if (values.some(([value]) => value === before)) select.value = before;
}
function offer() {
  const tasks = [...new Set(data.task)], seeds = [...new Set(data.seed)].sort((one, other) => one - other);
  fill($("task"), [["", "all"], ...tasks.map(task => [task, task])]);
  fill($("seed"), [["", "all"], ...seeds.map(seed => [String(seed), String(seed)])]);
  $("seeds").hidden = seeds.length < 2;
  const of = arm => data.arms.length > 1 ? ` of ${data.arms[arm]}` : "";
  fill($("outcome"), [["", "all"], ...data.arms.flatMap((_, arm) => [[`1-${arm}`, `successes${of(arm)}`],
    [`0-${arm}`, `failures${of(arm)}`]]), ...(data.arms.length > 1 ? [["differ", "arms differ"]] : [])]);
}
function fits(row) {
  const outcome = $("outcome").value;
  if ($("task").value && data.task[row] !== $("task").value) return false;
  if ($("seed").value && String(data.seed[row]) !== $("seed").value) return false;
  if (!outcome) return true;
  if (outcome === "differ") {
    return new Set(data.success.map(each => each[row]).filter(each => each !== null)).size > 1;
  }
  const [success, arm] = outcome.split("-").map(Number);
  return data.success[arm][row] === Boolean(success);
}
function choose(row = null) {
  if (row !== null && row < data.task.length && !fits(row)) for (const id of ["task", "outcome", "seed"]) $(id).value = "";
  rows = [...data.task.keys()].filter(each => fits(each) && data.video.some(videos => videos[each]));
  first = Math.max(0, rows.indexOf(row));
  glance();
  gallery();
}
function glance() {
  const tasks = new Map();
  data.task.forEach((task, row) => {
    if (!tasks.has(task)) tasks.set(task, []);
    tasks.get(task).push(row);
  });
  const parts = [];
  for (const [task, its] of tasks) {
    if ($("task").value && task !== $("task").value) continue;
    parts.push(make("h3", { textContent: task }));
    data.arms.forEach((name, arm) => {
      const cells = its.filter(row => data.success[arm][row] !== null).map(row => {
        const video = data.video[arm][row], cell = make(video ? "button" : "i", { className: "cell",
          title: `${titleOf(row)}, ${name}: ${outcomeOf(arm, row)}` });
        cell.classList.toggle("good", data.success[arm][row]);
        cell.classList.toggle("faint", !fits(row));
        if (video) {
          cell.tabIndex = -1;
          cell.setAttribute("aria-label", cell.title);
          cell.onclick = () => go(`rollouts-${group}-${row}`);
        }
        return cell;
      });
      const won = its.filter(row => data.success[arm][row]).length;
      parts.push(make("div", { className: "strip-of" }, make("span", { textContent: data.arms.length > 1 ? name : "" }),
        make("div", { className: "cells" }, ...cells),
        make("span", { className: "value dim", textContent: `${won} of ${cells.length}` })));
    });
  }
  $("glance").replaceChildren(...parts);
}
// In results of earlier versions, one file holds the rollouts of a task next to one another.
function tile(video, [, columns, lines, place]) {
  if (columns * lines === 1) return video;
  const box = make("div", { className: "tile" }, video);
  video.style.width = `${100 * columns}%`;
  video.style.left = `${-100 * (place % columns)}%`;
  video.style.top = `${-100 * Math.floor(place / columns)}%`;
  video.addEventListener("loadedmetadata", () => {
    box.style.aspectRatio = `${video.videoWidth / columns} / ${video.videoHeight / lines}`;
  });
  return box;
}
function gallery() {
  stop();
  for (const video of videos) video.removeAttribute("src");
  videos = [];
  now = 0;
  const shown = rows.slice(first, first + perPage());
  const cards = shown.map(row => make("article", {}, make("h3", { textContent: titleOf(row) }),
    make("div", { className: "arms" }, ...data.arms.map((name, arm) => side(row, name, arm)))));
  $("gallery").replaceChildren(...cards);
  $("gallery").className = data.arms.length === 1 ? "single" : data.arms.length > 2 ? "many" : "";
  $("count").textContent = rows.length ? `episodes ${first + 1} to ${first + shown.length} of ${rows.length} with a video`
    : "no episode with a video";
  $("earlier").disabled = first === 0;
  $("later").disabled = first + perPage() >= rows.length;
  seek(0);
}
function side(row, name, arm) {
  const state = data.success[arm][row], where = data.video[arm][row];
  const caption = make("figcaption", {}, ...(data.arms.length > 1 ? [make("b", { textContent: name }), " "] : []),
    make("span", { textContent: outcomeOf(arm, row), className: state === null ? "dim" : state ? "won" : "lost" }));
  if (!where) return make("figure", {}, make("div", { className: "none dim", textContent: "no video" }), caption);
  const video = make("video", { muted: true, playsInline: true, preload: "auto", src: `files/${where[0]}.mp4` });
  video.setAttribute("aria-label", `${titleOf(row)}, ${name}`);
  video.onloadedmetadata = () => { if (video.duration > Number($("place").max)) seek(now); };
  video.onerror = guarded(() => { throw new Error(`the browser cannot play the video of ${titleOf(row)}, ${name}`); });
  videos.push(video);
  return make("figure", {}, tile(video, where), caption);
}
const leader = () => videos.reduce((one, other) => (other.duration || 0) > (one?.duration || 0) ? other : one, videos[0]);
function update() {
  const length = leader()?.duration || 0;
  $("place").max = length || 1;
  $("place").value = now;
  $("time").textContent = `${now.toFixed(1)} s of ${length.toFixed(1)} s`;
}
function seek(to) {
  now = Math.min(Math.max(0, to), leader()?.duration || 0);
  // The last frame of a rollout that ended before is its outcome.
  for (const video of videos) video.currentTime = Math.min(now, Math.max(0, (video.duration || 0) - 0.02));
  update();
}
const atEnd = () => now >= (leader().duration || 0) - STEP;
function tick() {
  if (!playing) return;
  const longest = leader();
  now = longest.currentTime;
  if (longest.ended) return stop();
  for (const video of videos) {
    if (!video.ended && !video.seeking && video.duration > now && Math.abs(video.currentTime - now) > 0.2) {
      video.currentTime = now;
    }
  }
  update();
  requestAnimationFrame(tick);
}
function turn(pages) {
  const to = first + pages * perPage();
  if (to < rows.length && to + perPage() > 0) go(`rollouts-${group}-${rows[Math.max(0, to)]}`);
}
