// What the images of all episodes show: measured by the server in the background, asked for while it lasts.
"use strict";
const seen = new Map(), twins = new Map(), PAUSE = 1000;
let measured = 0, toMeasure = 0, notCompared = "";
// Episodes to look at, by the value in the list of filters.
const MARKS = {
  cuts: ["with cuts", row => row.cuts > 0],
  still: ["with a camera in which nothing moves", row => row.still.length > 0],
  frozen: ["with a camera that is frozen for a while", row => row.frozen.length > 0],
  twins: ["that occur more than once", row => twins.has(row.episode)],
  flaw: ["that cannot be read", row => row.flaw !== null],
};
const marked = (row, mark) => Boolean(row) && MARKS[mark][1](row);
// A dataset that is elsewhere is downloaded for it, so it begins when asked for.
function offerSurvey() {
  $("survey").replaceChildren(make("button", { textContent: "Look for motion, cuts and duplicates",
    onclick: guarded(() => { $("survey").textContent = ""; return survey(); }) }), " (downloads all episodes)");
}
async function survey() {
  for (const [value, [text]] of Object.entries(MARKS)) {
    $("only").append(make("option", { value, textContent: text }));
  }
  do {
    const name = `survey-${measured}`, data = await load(name);
    known.delete(name);
    for (const [episode, motion, cuts, still, frozen, flaw] of data.rows) {
      seen.set(episode, { episode, motion, cuts, still: still ?? [], frozen: frozen ?? [], flaw });
    }
    measured += data.rows.length;
    toMeasure = data.of;
    const ended = measured === data.measured && data.error;
    if (measured === toMeasure || ended) await findTwins();
    drawSurvey(data.rows.length > 0, ended ? `; it ended with an error: ${data.error}` : "");
    if (ended) return;
    if (measured < toMeasure && data.measured === measured) await new Promise(done => setTimeout(done, PAUSE));
  } while (measured < toMeasure);
}
async function findTwins() {
  known.delete("duplicates");
  twins.clear();
  const { groups, not_compared: num } = await load("duplicates");
  notCompared = num ? `${num.toLocaleString("en")} episodes are not looked through for almost the same frames, only the `
    + "first 1,000 of each instruction and length." : "";
  for (const group of groups) {
    for (const episode of group.episodes) twins.set(episode, group);
  }
}
function drawSurvey(more, error = "") {
  $("survey").textContent = measured < toMeasure ? `looked through ${measured.toLocaleString("en")} of `
    + `${toMeasure.toLocaleString("en")} episodes for motion, cuts and duplicates${error}` : "";
  if (more && ($("calmest").value || $("liveliest").value || $("only").value in MARKS)) filter();
  else draw();
  if (!$("statistics").hidden) drawMarks();
}
function likeOthers(episode) {
  const group = twins.get(episode);
  return group ? `${group.why} as episode ${group.episodes.filter(other => other !== episode).slice(0, 5).join(", ")}` : "";
}
