// Videos that play in step, on the pages that give `atEnd`, `seek` and `tick`, which moves all with the leading one.
"use strict";
let videos = [], playing = false;
function stop() {
  playing = false;
  for (const video of videos) video.pause();
  $("play").textContent = "Play";
}
function play() {
  if (playing) return stop();
  if (!videos.length) return;
  if (atEnd()) seek(0);
  playing = true;
  $("play").textContent = "Pause";
  for (const video of videos) {
    video.playbackRate = Number($("speed").value);
    // One that has ended would begin again.
    if (!(video.currentTime >= video.duration)) video.play().catch(() => {});
  }
  requestAnimationFrame(tick);
}
