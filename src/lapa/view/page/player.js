// The player: the first camera leads, the others follow.
"use strict";
let episode = null, asked = -1, frame = 0, updates = [];
async function show(index, at = 0) {
  chosen = asked = index;
  draw();
  stop();
  const isShown = latest("episode");
  const data = await load(`episode-${index}`).catch(error => {
    // The same may be asked for again.
    if (isShown()) asked = -1;
    throw error;
  });
  if (!isShown()) return;
  $("error").hidden = true;
  episode = data;
  updates = [];
  $("instruction").textContent = data.instruction || "(no instruction)";
  $("what").textContent = `episode ${data.number} · ${data.length} frames, ${few.format(data.length / about.fps)} s`
    + (data.source ? ` · ${data.source}` : "");
  for (const video of videos) video.removeAttribute("src");
  videos = data.videos.map(({ camera }) => {
    const video = make("video", { muted: true, playsInline: true, preload: "auto",
      src: `files/${index}-${camera}.mp4` });
    video.setAttribute("aria-label", `camera ${about.cameras[camera].name}`);
    video.onerror = guarded(() => { throw new Error(`the browser cannot play episode ${index}`); });
    return video;
  });
  $("videos").replaceChildren(...videos.map((video, place) => make("figure", {}, video,
    make("figcaption", { textContent: about.cameras[data.videos[place].camera].name }))));
  lanes(data);
  curves(data);
  seek(Math.min(at, data.length - 1));
  if (about.images) motion(index, isShown).catch(complain);
}
function update() {
  $("player").style.setProperty("--at", episode.length > 1 ? frame / (episode.length - 1) : 0);
  $("time").textContent = `${(frame / about.fps).toFixed(2)} s of ${(episode.length / about.fps).toFixed(2)} s,`
    + ` frame ${frame}`;
  $("timeline").setAttribute("aria-valuenow", frame);
  $("timeline").setAttribute("aria-valuetext", `${(frame / about.fps).toFixed(2)} seconds`);
  for (const one of updates) one();
}
function seek(to) {
  if (!episode) return;
  frame = Math.min(episode.length - 1, Math.max(0, to));
  videos.forEach((video, place) => {
    video.currentTime = episode.videos[place].start + (frame + 0.5) / about.fps;
  });
  update();
}
const atEnd = () => frame >= episode.length - 1;
function tick() {
  if (!playing) return;
  const [leader] = videos, { start, end } = episode.videos[0];
  frame = Math.min(episode.length - 1, Math.max(0, Math.floor((leader.currentTime - start) * about.fps + 0.01)));
  if (leader.ended || leader.currentTime >= end - 0.2 / about.fps) {
    seek(episode.length - 1);
    return stop();
  }
  videos.slice(1).forEach((video, place) => {
    const wanted = leader.currentTime - start + episode.videos[place + 1].start;
    if (!video.seeking && Math.abs(video.currentTime - wanted) > 0.2) video.currentTime = wanted;
  });
  update();
  requestAnimationFrame(tick);
}
function lane(content, act) {
  const box = make("div", { className: "lane" }, content, make("i", { className: "cursor" }));
  const frameAt = event => {
    const { left, width } = box.getBoundingClientRect();
    return Math.round(Math.min(1, Math.max(0, (event.clientX - left) / width)) * (episode.length - 1));
  };
  box.onpointerdown = event => {
    stop();
    box.setPointerCapture(event.pointerId);
    seek(frameAt(event));
  };
  box.onpointermove = event => { if (box.hasPointerCapture(event.pointerId)) seek(frameAt(event)); };
  if (act) box.onclick = event => act(frameAt(event));
  return box;
}
function lanes(data) {
  const graph = drawn("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  const timeline = lane(graph);
  timeline.id = "timeline";
  timeline.tabIndex = 0;
  const role = { role: "slider", "aria-label": "frame", "aria-valuemin": 0, "aria-valuemax": data.length - 1 };
  for (const [name, value] of Object.entries(role)) timeline.setAttribute(name, value);
  const parts = [make("span", { textContent: about.images ? "motion" : "time" }), timeline];
  const rowAt = new Map((data.code_frames ?? []).map((at, row) => [at, row]));
  const nearest = at => { while (at > 0 && !rowAt.has(at)) at--; return rowAt.get(at); };
  (about.labels?.codes ?? []).forEach((names, position) => {
    const canvas = make("canvas", { width: Math.max(1, data.length), height: 1 });
    const pen = canvas.getContext("2d");
    for (const [at, row] of rowAt) {
      pen.fillStyle = colour(data.codes[row][position]);
      pen.fillRect(at, 0, 1, 1);
    }
    canvas.style.imageRendering = "pixelated";
    const strip = lane(canvas, at => {
      const row = nearest(at);
      if (row !== undefined && data.codes[row][position] >= 0) go(`code-${position}-${data.codes[row][position]}`);
    });
    strip.className = "lane strip";
    strip.title = "press a code to see where else it occurs";
    strip.style.cursor = "pointer";
    parts.push(make("span", { textContent: positionName(position) }), strip);
  });
  $("lanes").replaceChildren(...parts);
  const chips = (about.labels?.codes ?? []).map((names, position) => {
    const chip = make("button", { className: "chip" });
    updates.push(() => {
      const row = rowAt.get(frame), code = row === undefined ? -1 : data.codes[row][position];
      chip.disabled = code < 0;
      chip.textContent = `${positionName(position)}: ${row === undefined ? "none" : names[code] ?? "rare"}`;
      chip.style.setProperty("--code", colour(code));
      chip.onclick = () => go(`code-${position}-${code}`);
    });
    return chip;
  });
  $("now").replaceChildren(...chips);
}
async function motion(index, isShown) {
  const data = await load(`motion-${index}`);
  if (!isShown()) return;
  const graph = $("timeline").querySelector("svg"), last = Math.max(1, episode.length - 1);
  const all = data.frames.map((at, place) => Math.max(0, ...data.cameras.map(energies => energies[place])));
  const top = Math.max(0.02, ...all);
  const points = data.frames.map((at, place) => `${1000 * at / last},${100 - 92 * all[place] / top}`);
  graph.replaceChildren(drawn("polygon", { class: "area", points: `0,100 ${points.join(" ")} 1000,100` }));
  for (const at of data.cuts) {
    graph.append(drawn("line", { class: "cut", x1: 1000 * at / last, x2: 1000 * at / last, y1: 0, y2: 100 }));
  }
  const notes = [];
  if (data.cuts.length) notes.push(`${data.cuts.length} cut${data.cuts.length > 1 ? "s" : ""} at frame `
    + data.cuts.join(", "));
  for (const [cameras, what] of [[data.still, "shows nothing that moves"], [data.frozen, "is frozen for a while"]]) {
    if (cameras.length) notes.push(`camera ${cameras.map(place => about.cameras[place].name).join(", ")} ${what}`);
  }
  if (likeOthers(index)) notes.push(likeOthers(index));
  if (notes.length) $("what").append(" · ", make("span", { className: "error", textContent: notes.join("; ") }));
}
function curves(data) {
  const parts = [];
  for (const [kind, title] of [["actions", "Actions"], ["states", "States"]]) {
    if (!data[kind]) continue;
    const last = Math.max(1, data.length - 1);
    const charts = about[kind].map((name, dim) => {
      const values = data[kind].map(row => row[dim]);
      const low = Math.min(...values), high = Math.max(...values), span = high - low || 1;
      const y = value => 94 - 88 * (high > low ? (value - low) / span : 0.5);
      const graph = drawn("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", "aria-hidden": "true" });
      if (low < 0 && high > 0) graph.append(drawn("line", { class: "zero", x1: 0, x2: 1000, y1: y(0), y2: y(0) }));
      const points = values.map((value, place) => `${1000 * data.frames[place] / last},${y(value)}`);
      graph.append(drawn("polyline", { class: "curve", points: points.join(" ") }));
      const value = make("span", { className: "value" });
      updates.push(() => {
        let place = Math.min(values.length - 1, Math.round(frame / last * (values.length - 1)));
        value.textContent = short(values[place]);
      });
      const box = make("figure", {}, make("figcaption", {}, make("b", { textContent: name }), value), lane(graph));
      box.title = `${short(low)} to ${short(high)}`;
      return box;
    });
    parts.push(make("h3", { textContent: title }), make("div", { className: "curves" }, ...charts));
  }
  $("curves").replaceChildren(...parts);
}
