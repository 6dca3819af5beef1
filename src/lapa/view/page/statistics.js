// Statistics, and what to look at.
"use strict";
function only(value) {
  for (const id of ["search", "source", "shortest", "longest", "calmest", "liveliest"]) $(id).value = "";
  $("only").value = value;
  go("episodes");
  filter();
  $("list").scrollTop = 0;
  draw();
}
function drawMarks() {
  const flags = [
    [rows.instruction.filter(text => !text).length, "Episodes without an instruction", "bare"],
    [rows.length.filter(length => length / about.fps < 1).length, "Episodes shorter than 1 s", "short"],
    ...(toMeasure ? Object.entries(MARKS).map(([mark, [text]]) =>
      [[...seen.values()].filter(row => marked(row, mark)).length, `Episodes ${text}`, mark]) : []),
  ];
  $("suspicious").replaceChildren(...flags.map(([count, text, value]) => make("p", { className: "row" }, `${text}: `,
    count ? make("button", { textContent: `show ${count.toLocaleString("en")}`, onclick: () => only(value) }) : "none")),
    ...[measured < toMeasure ? $("survey").textContent : "", notCompared,
      about.images && !toMeasure ? "Motion, cuts and duplicates are not looked for yet" : ""]
      .filter(Boolean).map(textContent => make("p", { className: "dim", textContent })));
}
async function showStatistics() {
  const lengths = [...rows.length].sort((one, other) => one - other), at = share => lengths[Math.floor(share
    * (lengths.length - 1))] / about.fps;
  const counts = new Map();
  for (const text of rows.instruction) counts.set(text, (counts.get(text) ?? 0) + 1);
  counts.delete("");
  table($("figures"), null, [
    ["episodes", about.episodes.toLocaleString("en")], ["frames", about.frames.toLocaleString("en")],
    ["hours", short(about.frames / about.fps / 3600)], ["frames a second", short(about.fps)],
    ["seconds of an episode", `${short(at(0))} to ${short(at(1))}, median ${short(at(0.5))}`],
    ...about.cameras.map(({ name, size }) => [`camera ${name}`, `${size[0]} x ${size[1]}`]),
    ["instructions", counts.size.toLocaleString("en")],
    ["action dimensions", `${about.actions.length || "none"}`], ["state dimensions", `${about.states.length || "none"}`],
    ...(about.control ? [["control", about.control]] : []),
    ...(about.labels ? [["labelled frames", about.labels.rows.toLocaleString("en")],
      ["latent action", `${about.labels.length} codes of ${about.labels.codebook}`],
      ["horizon", `${short(about.labels.seconds)} s`]] : []),
  ]);
  const most = [...counts].sort((one, other) => other[1] - one[1]).slice(0, 30);
  table($("instructions"), null, most.map(([text, count]) => [text, count.toLocaleString("en")]));
  drawMarks();
  const data = await load("statistics");
  const cards = ["actions", "states"].filter(kind => data[kind]).map(kind => {
    const element = make("table"), columns = ["mean", "std", "min", "q01", "median", "q99", "max"];
    table(element, ["", "mean", "std", "least", "1%", "median", "99%", "greatest"], data[kind].map((figures, dim) => [about[kind][dim],
      ...columns.map(name => short(figures[name]))]));
    return make("div", { className: "card wide" },
      make("h2", { textContent: `${kind[0].toUpperCase()}${kind.slice(1)}, over ${data.sample} episodes` }), element);
  });
  $("numbers").replaceChildren(...cards);
}
