// The page of a dataset, and of labels on it.
"use strict";
// Addresses: #episode-17@40, #codes-1, #code-0-5, #statistics.
function go(hash) {
  if (location.hash.slice(1) === hash) route();
  else location.hash = hash;
}
const route = guarded(async () => {
  const hash = location.hash.slice(1), [, kind, ...numbers] = /^(\w+?)(?:-(\d+))?(?:[-@](\d+))?$/.exec(hash) ?? [];
  const [one, two] = numbers.map(number => number === undefined ? null : Number(number));
  const view = kind === "statistics" ? "statistics" : kind?.startsWith("code") && about.labels ? "codes" : "episodes";
  for (const name of ["episodes", "codes", "statistics"]) {
    $(name).hidden = name !== view;
    $(`tab-${name}`).setAttribute("aria-pressed", name === view);
  }
  if (view !== "episodes") stop();
  if (view !== "codes") dropClips();
  if (view === "statistics") return showStatistics();
  if (view === "codes") {
    position = Math.min(one ?? position, about.labels.codes.length - 1);
    return showCode(kind === "code" ? two : null);
  }
  draw();
  if (kind === "episode" && one !== asked) return show(one, two ?? 0);
  if (kind === "episode" && two !== null) return seek(two);
  if (kind === "episode") return;
  if (!episode && found.length) return show(rows.index[found[0]]);
});

function listen() {
  for (const id of ["search", "source", "shortest", "longest", "calmest", "liveliest", "only"]) {
    $(id).oninput = () => { $("list").scrollTop = 0; filter(); };
  }
  $("list").onscroll = draw;
  addEventListener("resize", draw);
  $("tab-episodes").onclick = () => go(chosen >= 0 ? `episode-${chosen}` : "episodes");
  $("tab-codes").onclick = () => go(`codes-${position}`);
  $("tab-statistics").onclick = () => go("statistics");
  $("play").onclick = play;
  $("back").onclick = () => { stop(); seek(frame - 1); };
  $("forward").onclick = () => { stop(); seek(frame + 1); };
  $("speed").onchange = () => { for (const video of videos) video.playbackRate = Number($("speed").value); };
  $("pause").textContent = running ? "Pause all" : "Play all";
  $("pause").onclick = () => {
    running = !running;
    $("pause").textContent = running ? "Pause all" : "Play all";
    for (const { video } of clips) if (running) video.play().catch(() => {}); else video.pause();
  };
  matchMedia("(prefers-color-scheme: dark)").onchange = () => { if (!$("codes").hidden) drawMatrix(
    about.labels.codes[position]); };
  addEventListener("hashchange", route);
  addEventListener("keydown", event => {
    const typing = event.target.closest("input, select"), page = Math.floor($("list").clientHeight / HEIGHT);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === $("list") && steps) move(steps);
    else if (typing || $("episodes").hidden) return;
    else if (event.key === "/") $("search").focus();
    else if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
    else if (event.key === "ArrowLeft") { stop(); seek(frame - 1); }
    else if (event.key === "ArrowRight") { stop(); seek(frame + 1); }
    else if (event.key === " " && !event.target.closest("button")) play();
    else return;
    event.preventDefault();
  });
  requestAnimationFrame(repeat);
}

guarded(async () => {
  about = await load("about");
  document.title = `${about.name} · lapa view`;
  $("title").textContent = about.name;
  $("about").textContent = [`${about.episodes.toLocaleString("en")} episodes`,
    `${duration(about.frames / about.fps)} at ${few.format(about.fps)} fps`,
    about.cameras.map(camera => camera.name).join(", "),
    about.actions.length ? `${about.actions.length} action dimensions` : "no actions",
    ...(about.labels ? [`labels: ${about.labels.length} codes of ${about.labels.codebook}`] : [])].join(" · ");
  $("tab-codes").hidden = !about.labels;
  listen();
  for (let page = 0; page < about.pages; page++) {
    const data = await load(`episodes-${page}`);
    known.delete(`episodes-${page}`);
    for (const name of ["index", "length"]) for (const value of data[name]) rows[name].push(value);
    for (const name of ["instruction", "source"]) for (const number of data[name]) rows[name].push(data.texts[number]);
    filter();
    if (page === 0) route();
  }
  // Opened before all rows were here.
  if (about.pages > 1 && !$("statistics").hidden) await showStatistics();
  if (about.images && (exported || !about.elsewhere)) await survey();
  else if (about.images) offerSurvey();
})();
