// What the images of all episodes show: measured by the server in the background, asked for while it lasts.
"use strict";
const seen = new Map(), twins = new Map(), PAUSE = 1000;
let measured = 0, toMeasure = 0;
// Episodes to look at, by the value in the list of filters.
const MARKS = {
  cuts: ["with cuts", row => row.cuts > 0],
  still: ["with a camera in which nothing moves", row => row.still.length > 0],
  frozen: ["with a camera that is frozen for a while", row => row.frozen.length > 0],
  twins: ["that occur more than once", row => twins.has(row.episode)],
  flaw: ["that cannot be read", row => row.flaw !== null],
};
const marked = (row, mark) => Boolean(row) && MARKS[mark][1](row);
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
    if (measured === toMeasure) await findTwins();
    surveyed(data.rows.length > 0);
    if (measured < toMeasure && data.measured === measured) await new Promise(done => setTimeout(done, PAUSE));
  } while (measured < toMeasure);
}
async function findTwins() {
  known.delete("duplicates");
  twins.clear();
  for (const group of (await load("duplicates")).groups) {
    for (const episode of group.episodes) twins.set(episode, group);
  }
}
function surveyed(more) {
  $("survey").textContent = measured < toMeasure ? `looked through ${measured.toLocaleString("en")} of `
    + `${toMeasure.toLocaleString("en")} episodes for motion, cuts and duplicates` : "";
  if (more && ($("calmest").value || $("liveliest").value || $("only").value in MARKS)) filter();
  else draw();
  if (!$("statistics").hidden) drawMarks();
}
function likeOthers(episode) {
  const group = twins.get(episode);
  return group ? `${group.why} as episode ${group.episodes.filter(other => other !== episode).slice(0, 5).join(", ")}` : "";
}
