// The page of results and of a study: success rates, rollouts, the report and how far the runs are.
"use strict";
let about = null, group = 0, reported = false;
// Addresses: #success-0, #rollouts-0, #rollouts-0-17, #report, #runs; the numbers are a group and a row of it.
function go(hash) {
  if (location.hash.slice(1) === hash) route();
  else location.hash = hash;
}
const route = guarded(async () => {
  const [, kind, one, two] = /^(\w+?)(?:-(\d+))?(?:-(\d+))?$/.exec(location.hash.slice(1)) ?? [];
  const views = ["success", "rollouts", ...(about.report ? ["report"] : []), ...(about.runs ? ["runs"] : [])];
  const view = views.includes(kind) && about.groups.length ? kind : about.groups.length ? "success" : "runs";
  for (const name of ["success", "rollouts", "report", "runs"]) {
    $(name).hidden = name !== view;
    $(`tab-${name}`).setAttribute("aria-pressed", name === view);
  }
  $("which").hidden = about.groups.length < 2 || !["success", "rollouts"].includes(view);
  // The report has its own.
  $("cautions").hidden = !about.cautions?.length || view === "report";
  const isShown = latest("view");
  if (view !== "rollouts") stop();
  if (view === "report") return showReport();
  if (view === "runs") return showRuns();
  const changed = one !== undefined && Number(one) !== group;
  if (one !== undefined) group = Math.min(Number(one), about.groups.length - 1);
  $("group").value = group;
  const wanted = await load(`group-${group}`);
  if (!isShown()) return;
  if (changed || data !== wanted) {
    data = wanted;
    offer();
  }
  if (view === "success") return showSuccess();
  choose(two === undefined ? null : Number(two));
});
function rateOf(cell) {
  if (!cell) return make("td", { textContent: "-" });
  const ends = cell.low !== null, box = make("div", { className: "rate" }, make("i"), ...(ends ? [make("b")] : []));
  box.firstChild.style.width = `${100 * cell.rate}%`;
  if (ends) {
    box.lastChild.style.left = `${100 * cell.low}%`;
    box.lastChild.style.width = `${100 * (cell.high - cell.low)}%`;
  }
  const interval = ends ? ` (${few.format(100 * cell.low)} to ${few.format(100 * cell.high)})` : " (too few for an interval)";
  return make("td", {}, make("div", { className: "value" }, make("strong", { textContent: percent(cell.rate) }), interval),
    box, make("small", { className: "dim", textContent: `${cell.successes} of ${cell.episodes}` }));
}
function showSuccess() {
  const head = make("tr", {}, make("th", { textContent: "task" }), ...data.arms.map(arm => make("th", { textContent: arm })));
  const lines = data.tasks.map(task => make("tr", { className: task.name === null ? "all" : "" },
    make("td", {}, task.name === null ? "all tasks" : make("button", { textContent: task.name, onclick: () => {
      $("task").value = task.name;
      $("outcome").value = "";
      go(`rollouts-${group}`);
    } })), ...task.arms.map(rateOf)));
  $("rates").replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
  $("differences").hidden = !data.notes.length;
  $("notes").replaceChildren(...data.notes.map(note => make("li", { textContent: note })));
  $("settings").hidden = !about.settings.length;
  if (about.settings.length) {
    table($("settings-table"), ["", ...about.arms], about.settings.map(([name, values]) => [name, ...values]));
  }
}
function showRuns() {
  table($("runs-table"), ["split", "videos a task", "labelled episodes a task", "arm", "seed", "state"],
    about.runs.map(run => [...Object.values(run.setting), run.arm, run.seed, run.text]));
  about.runs.forEach((run, place) => $("runs-table").tBodies[0].rows[place].lastChild.classList.add(run.kind));
}
async function showReport() {
  if (reported) return;
  $("report").replaceChildren(make("p", { className: "dim", textContent: "loading" }));
  const { blocks } = await load("report");
  reported = true;
  $("report").replaceChildren(...blocks.map(drawnBlock));
}
function drawnBlock(block) {
  if (block.kind === "heading") return make(`h${block.level}`, { textContent: block.text });
  if (block.kind === "paragraph") return make("p", { textContent: block.text });
  if (block.kind === "bullets") {
    return make("ul", { className: block.highlighted ? "findings" : "" }, ...block.items.map(([word, text]) =>
      make("li", {}, ...(word ? [make("b", { textContent: `${word}: ` })] : []), text)));
  }
  if (block.kind === "table") {
    const element = make("table");
    table(element, block.header, block.rows);
    element.prepend(make("caption", { textContent: block.title }));
    return make("div", { className: "wide" }, element);
  }
  const image = make("img", { src: `files/${block.file}.png`, alt: block.caption, loading: "lazy" });
  return make("figure", {}, image, make("figcaption", { textContent: block.caption }));
}
function listen() {
  for (const name of ["success", "rollouts"]) $(`tab-${name}`).onclick = () => go(`${name}-${group}`);
  for (const name of ["report", "runs"]) $(`tab-${name}`).onclick = () => go(name);
  $("group").onchange = () => go(`${$("success").hidden ? "rollouts" : "success"}-${$("group").value}`);
  for (const id of ["task", "outcome", "seed"]) $(id).onchange = () => {
    history.replaceState(null, "", `#rollouts-${group}`);
    choose();
  };
  $("play").onclick = play;
  $("back").onclick = () => { stop(); seek(now - STEP); };
  $("forward").onclick = () => { stop(); seek(now + STEP); };
  $("place").oninput = () => { stop(); seek(Number($("place").value)); };
  $("speed").onchange = () => { for (const video of videos) video.playbackRate = Number($("speed").value); };
  $("earlier").onclick = () => turn(-1);
  $("later").onclick = () => turn(1);
  addEventListener("hashchange", route);
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("rollouts").hidden) return;
    if (event.target.closest("input, select")) return;
    if (event.key === "j") turn(1);
    else if (event.key === "k") turn(-1);
    else if (event.key === "ArrowLeft") { stop(); seek(now - STEP); }
    else if (event.key === "ArrowRight") { stop(); seek(now + STEP); }
    else if (event.key === " " && !event.target.closest("button")) play();
    else return;
    event.preventDefault();
  });
}

guarded(async () => {
  about = await load("about");
  document.title = `${about.name} · lapa view`;
  $("title").textContent = about.name;
  $("about").textContent = about.facts.join(" · ");
  $("cautions").textContent = about.cautions?.join("; ");
  $("tab-report").hidden = !about.report;
  $("tab-runs").hidden = !about.runs;
  for (const name of ["success", "rollouts"]) $(`tab-${name}`).hidden = !about.groups.length;
  fill($("group"), about.groups.map((name, number) => [String(number), name]));
  listen();
  route();
})();
