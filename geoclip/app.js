// The page of geoclip/app.py: a globe on a canvas, and beside it the image and its answer. Nothing is fetched.

const RAD = Math.PI / 180, EARTH_KM = 6371.0088, PART = 4e6; // bytes of a file that are sent at once
const BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="; // without a source, a broken picture is shown
const COLOUR = { half: "#F0E442", most: "#56B4E9", rest: "#ffffff", truth: "#D55E00", guess: "#CC79A7" };

const HTML = `
<div class="controls" role="group" aria-label="Settings">
  <label>How <select class="mode"><option value="explore">ask anywhere</option>
    <option value="guess">guess before the model</option></select></label>
  <label>Answer <select class="decision"></select></label>
  <label>Places <input class="top" type="number" min="1" value="5"></label>
</div>
<div class="columns">
  <section class="map" aria-label="Map">
    <canvas class="globe" tabindex="0" role="application" aria-label="Globe. Arrow keys turn it, plus and minus zoom,
      Enter chooses the place in the centre."></canvas>
    <div class="row">
      <button class="near">To the answer</button><button class="far">Whole Earth</button>
      <button class="in" aria-label="Zoom in">+</button><button class="out" aria-label="Zoom out">−</button>
      <form class="place"><label>Lat <input class="lat" type="number" min="-90" max="90" step="any" value="0"></label>
        <label>Lon <input class="lon" type="number" min="-180" max="180" step="any" value="0"></label>
        <button>Choose</button></form>
    </div>
    <ul class="legend" aria-label="Legend">
      <li><i class="disc half"></i>in the 50 % region</li><li><i class="disc most"></i>in the 90 % region</li>
      <li><i class="disc rest"></i>outside</li><li><i class="number">1</i>answers</li>
      <li><i class="ring"></i>truth</li><li><i class="diamond"></i>your guess</li>
    </ul>
  </section>
  <section class="side" aria-label="Image and answer">
    <div class="top-row">
      <figure><img class="seen" alt="" src="${BLANK}"><figcaption>what the model sees</figcaption></figure>
      <div class="messages"><p class="said" role="status" aria-live="polite"></p>
        <progress class="progress" max="1" aria-label="Progress"></progress><p class="score" role="status"></p></div>
    </div>
    <div class="row ask">
      <button class="new">Random tile</button>
      <label class="button">Choose photos<input class="files" type="file" accept="image/*" multiple></label>
      <form class="words"><input class="text" maxlength="300" aria-label="A text to search for"
        placeholder="a text, such as: desert"><button>Find</button></form>
    </div>
    <div class="row photos" role="group" aria-label="Photos"></div>
    <table class="answers"><caption>Most likely places</caption>
      <thead><tr><th>#</th><th>place</th><th>share</th><th>km off</th></tr></thead><tbody></tbody></table>
    <p class="regions"></p><p class="notes"></p>
    <div class="row downloads" role="group" aria-label="Downloads">
      <button data-style="json">JSON</button><button data-style="csv">CSV</button><button data-style="png">PNG</button>
      <button data-style="tile">Tile</button></div>
  </section>
</div>`;

const vector = (lat, lon) => [
  Math.cos(lat * RAD) * Math.cos(lon * RAD), Math.cos(lat * RAD) * Math.sin(lon * RAD), Math.sin(lat * RAD)];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const km = (a, b) => EARTH_KM * Math.acos(Math.max(-1, Math.min(1, dot(vector(...a), vector(...b)))));
const points = (error) => 5000 * Math.exp(-error / 1492.7); // the geoscore
const whole = (x) => Math.round(x).toLocaleString("en");
const digits = (x) => (x < 10 ? x.toFixed(1) : whole(x));
const distance = (x) => digits(x) + " km";
const percent = (x) => (x < 0.001 ? "< 0.1 %" : (100 * x).toFixed(1) + " %");

class Globe {
  constructor(canvas, chosen) {
    Object.assign(this, { canvas, lat: 20, lon: 0, zoom: 1, marks: null, lines: [], texture: null, pending: 0 });
    const held = new Map();
    let moved = 0, pinch = 0;
    canvas.addEventListener("pointerdown", (e) => {
      canvas.setPointerCapture(e.pointerId);
      held.set(e.pointerId, [e.offsetX, e.offsetY]);
      moved = held.size > 1 ? 99 : 0;
    });
    canvas.addEventListener("pointermove", (e) => {
      const from = held.get(e.pointerId);
      if (!from) return;
      held.set(e.pointerId, [e.offsetX, e.offsetY]);
      if (held.size === 2) {
        const [a, b] = [...held.values()], apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
        if (pinch) this.look(this.lat, this.lon, this.zoom * apart / pinch);
        pinch = apart;
        return;
      }
      const [dx, dy] = [e.offsetX - from[0], e.offsetY - from[1]];
      moved += Math.abs(dx) + Math.abs(dy);
      if (moved > 5) this.turn(dy, -dx);
    });
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, (e) => {
        held.delete(e.pointerId);
        pinch = 0;
        const place = this.at(e.offsetX, e.offsetY);
        if (name === "pointerup" && moved <= 5 && place) chosen(...place);
      });
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      this.look(this.lat, this.lon, this.zoom * Math.exp(-e.deltaY / 400));
    }, { passive: false });
    canvas.addEventListener("keydown", (e) => {
      const step = { ArrowUp: [20, 0], ArrowDown: [-20, 0], ArrowLeft: [0, -20], ArrowRight: [0, 20] }[e.key];
      if (step) this.turn(...step);
      else if (e.key === "+" || e.key === "=") this.look(this.lat, this.lon, this.zoom * 1.5);
      else if (e.key === "-") this.look(this.lat, this.lon, this.zoom / 1.5);
      else if (e.key === "Enter") chosen(this.lat, this.lon);
      else return;
      e.preventDefault();
    });
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.draw());
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(canvas);
  }

  get size() { return this.canvas.clientWidth; }

  get radius() { return 0.48 * this.size * this.zoom; }

  turn(up, right) { // pixels
    const degrees = 1 / (this.radius * RAD);
    this.look(this.lat + up * degrees, this.lon + right * degrees / Math.max(0.2, Math.cos(this.lat * RAD)), this.zoom);
  }

  look(lat, lon, zoom) {
    this.lat = Math.max(-89.9, Math.min(89.9, lat));
    this.lon = ((lon + 540) % 360) - 180;
    this.zoom = Math.max(1, Math.min(400, zoom));
    this.draw();
  }

  fly(lat, lon, zoom) {
    const start = performance.now(), [lat0, lon0, zoom0] = [this.lat, this.lon, this.zoom];
    const turn = ((lon - lon0 + 540) % 360) - 180;
    const quick = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const step = (now) => {
      const t = quick ? 1 : Math.min(1, Math.max(0, (now - start) / 700)), s = t * t * (3 - 2 * t);
      this.look(lat0 + (lat - lat0) * s, lon0 + turn * s, zoom0 * (zoom / zoom0) ** s);
      if (t < 1) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  axes() { // unit vectors to the right, up and towards the reader
    const [sp, cp, sl, cl] = [this.lat, this.lon].flatMap((x) => [Math.sin(x * RAD), Math.cos(x * RAD)]);
    return [[-sl, cl, 0], [-sp * cl, -sp * sl, cp], [cp * cl, cp * sl, sp]];
  }

  at(px, py) { // (lat, lon) of a pixel, or null beside the Earth
    const x = (px - this.size / 2) / this.radius, y = (this.size / 2 - py) / this.radius, rest = 1 - x * x - y * y;
    if (rest < 0) return null;
    const [right, up, out] = this.axes(), z = Math.sqrt(rest);
    const v = [0, 1, 2].map((i) => x * right[i] + y * up[i] + z * out[i]);
    return [Math.asin(Math.max(-1, Math.min(1, v[2]))) / RAD, Math.atan2(v[1], v[0]) / RAD];
  }

  draw() {
    if (!this.pending) this.pending = requestAnimationFrame(() => { this.pending = 0; this.paint(); });
  }

  paint() {
    const { canvas } = this, ratio = window.devicePixelRatio || 1;
    if (!this.size) return;
    if (canvas.width !== Math.round(this.size * ratio)) canvas.width = canvas.height = Math.round(this.size * ratio);
    const c = canvas.getContext("2d"), half = this.size / 2, r = this.radius, [right, up, out] = this.axes();
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, this.size, this.size);
    this.paintEarth(c);
    const project = (v) => { // places behind the horizon are moved onto it
      let x = dot(v, right), y = dot(v, up);
      const front = dot(v, out) > 0;
      if (!front) { const d = Math.hypot(x, y) || 1; x /= d; y /= d; }
      return [half + x * r, half - y * r, front];
    };
    const path = (vectors, jump) => { // jump: leave out what is behind the Earth
      let open = false;
      for (const v of vectors) {
        const [x, y, front] = project(v);
        if (open && (front || !jump)) c.lineTo(x, y); else c.moveTo(x, y);
        open = front || !jump;
      }
    };
    c.save();
    c.beginPath(); c.arc(half, half, r, 0, 2 * Math.PI); c.clip();
    c.beginPath();
    for (const line of this.zoom < 20 ? this.lines : []) path(line, true); // they are too coarse for a close look
    c.strokeStyle = "rgba(255,255,255,.45)"; c.lineWidth = 0.6; c.stroke();
    for (const region of this.marks?.regions ?? []) {
      const inner = region.probability < 0.9;
      c.beginPath();
      for (const ring of region.rings) { path(ring, false); c.closePath(); }
      c.fillStyle = inner ? "rgba(240,228,66,.30)" : "rgba(86,180,233,.25)"; c.fill("evenodd");
      c.strokeStyle = inner ? COLOUR.half : COLOUR.most; c.lineWidth = 1.6;
      c.setLineDash(inner ? [] : [5, 3]); c.stroke(); c.setLineDash([]);
    }
    for (const [v, level] of this.marks?.draws ?? []) {
      const [x, y, front] = project(v);
      if (!front) continue;
      c.beginPath(); c.arc(x, y, 2, 0, 2 * Math.PI);
      c.fillStyle = [COLOUR.rest, COLOUR.most, COLOUR.half][level]; c.globalAlpha = level ? 0.9 : 0.5; c.fill();
    }
    c.globalAlpha = 1;
    c.restore();
    this.paintMarks(c, project);
    if (document.activeElement === canvas && canvas.matches(":focus-visible")) {
      c.beginPath(); c.moveTo(half - 12, half); c.lineTo(half + 12, half);
      c.moveTo(half, half - 12); c.lineTo(half, half + 12);
      c.strokeStyle = "#fff"; c.lineWidth = 2; c.stroke();
    }
  }

  paintMarks(c, project) {
    const around = (place, shape, colour, width) => {
      const [x, y, front] = project(vector(...place));
      if (!front) return;
      for (const [stroke, w] of [["#fff", width + 2.5], [colour, width]]) {
        c.beginPath(); shape(x, y); c.closePath();
        c.strokeStyle = stroke; c.lineWidth = w; c.stroke();
      }
    };
    const { places = [], truth, guess } = this.marks ?? {};
    if (truth) around(truth, (x, y) => c.arc(x, y, 13, 0, 2 * Math.PI), COLOUR.truth, 2.5);
    if (guess) around(guess, (x, y) => [[0, -9], [9, 0], [0, 9], [-9, 0]].forEach(
      ([dx, dy], i) => (i ? c.lineTo(x + dx, y + dy) : c.moveTo(x + dx, y + dy))), COLOUR.guess, 2.5);
    for (let i = places.length - 1; i >= 0; i--) {
      const [x, y, front] = project(vector(...places[i]));
      if (!front) continue;
      c.beginPath(); c.arc(x, y, 8, 0, 2 * Math.PI); c.fillStyle = "#fff"; c.fill();
      c.strokeStyle = "#000"; c.lineWidth = 1; c.stroke();
      c.fillStyle = "#000"; c.font = "bold 10px sans-serif"; c.textAlign = "center"; c.textBaseline = "middle";
      c.fillText(i + 1, x, y + 0.5);
    }
  }

  paintEarth(c) {
    const { texture, size } = this, r = this.radius;
    if (!texture) {
      c.beginPath(); c.arc(size / 2, size / 2, r, 0, 2 * Math.PI); c.fillStyle = "#0b1b3a"; c.fill();
      return;
    }
    const n = Math.round(size), picture = new ImageData(n, n), [right, up, out] = this.axes();
    const { width: w, height: h, data } = texture;
    for (let py = 0, at = 0; py < n; py++) {
      const y = (n / 2 - py - 0.5) / r;
      for (let px = 0; px < n; px++, at += 4) {
        const x = (px + 0.5 - n / 2) / r, rest = 1 - x * x - y * y;
        if (rest < 0) continue;
        const z = Math.sqrt(rest);
        const lat = Math.asin(x * right[2] + y * up[2] + z * out[2]);
        const lon = Math.atan2(x * right[1] + y * up[1] + z * out[1], x * right[0] + y * up[0] + z * out[0]);
        const u = (lon / Math.PI + 1) / 2 * w - 0.5, v = Math.min(h - 1.001, Math.max(0, (0.5 - lat / Math.PI) * h - 0.5));
        const u0 = Math.floor(u), v0 = Math.floor(v), a = u - u0, b = v - v0;
        const left = (v0 * w + (u0 + w) % w) * 4, next = (v0 * w + (u0 + 1) % w) * 4, below = w * 4;
        for (let i = 0; i < 3; i++)
          picture.data[at + i] = 12 + 1.25 * ((1 - b) * ((1 - a) * data[left + i] + a * data[next + i])
            + b * ((1 - a) * data[left + below + i] + a * data[next + below + i]));
        picture.data[at + 3] = 255;
      }
    }
    this.held ??= document.createElement("canvas");
    this.held.width = this.held.height = n;
    this.held.getContext("2d").putImageData(picture, 0, 0);
    c.drawImage(this.held, 0, 0, size, size);
  }
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function render({ model, el }) {
  el.classList.add("geoclip");
  el.innerHTML = HTML;
  const $ = (name) => el.querySelector(name);
  const fixed = model.get("fixed");
  const score = { rounds: 0, you: 0, model: 0 };
  let answers = [], shown = -1, guessing = false, guess = null;
  const globe = new Globe($(".globe"), chosen);

  const say = (text) => { $(".said").textContent = text; };
  const ask = (content) => { say("Looking …"); model.send(content); };
  function forget() {
    answers = []; shown = -1; guessing = false; guess = null; globe.marks = null;
    $(".photos").replaceChildren(); $(".seen").src = BLANK; $(".seen").alt = "";
    show();
  }
  function chosen(lat, lon) {
    [$(".lat").value, $(".lon").value] = [lat.toFixed(3), lon.toFixed(3)];
    if (!model.get("state").ready) return;
    if (guessing) {
      guess = [lat, lon]; guessing = false;
      show();
      const { truth, places } = answers[shown];
      if (truth) {
        const yours = km(guess, truth), its = places[0].error_km;
        score.rounds++; score.you += points(yours); score.model += points(its);
        say(`You are ${distance(yours)} off, the model ${distance(its)}: ${yours < its ? "you win." : "the model wins."}`);
        $(".score").textContent = `Points after ${score.rounds}: you ${whole(score.you)}, model ${whole(score.model)}`
          + ` of ${whole(5000 * score.rounds)}`;
        globe.fly(...truth, 1);
      }
    } else if ($(".mode").value === "guess") {
      say(`Choose a photo or press “${$(".new").textContent}” first.`);
    } else if (!model.get("state").photos) {
      forget();
      globe.marks = { truth: [lat, lon] }; globe.draw();
      ask({ kind: "place", lat, lon });
    }
  }

  function show() { // the answer `shown`, or empty rows of the same height
    const found = guessing ? null : answers[shown], rows = [];
    for (let i = 0; i < Number($(".top").value); i++) {
      const place = found?.places[i], row = document.createElement("tr");
      const share = place && place.probability !== null ? percent(place.probability) : "";
      for (const text of [i + 1, "", share, place?.error_km !== undefined ? digits(place.error_km) : ""])
        row.insertCell().textContent = text;
      if (place) {
        const button = Object.assign(document.createElement("button"), { textContent: found.near[i] });
        button.title = `Zoom to ${found.near[i]}: ${place.lat}, ${place.lon}`;
        button.onclick = () => globe.fly(place.lat, place.lon, Math.max(globe.zoom, 20));
        row.cells[1].append(button);
      }
      rows.push(row);
    }
    $("tbody").replaceChildren(...rows);
    $(".regions").textContent = found ? found.regions.map((region) =>
      `${100 * region.probability} % within ${whole(region.area_km2)} km²`).join(", ") + ". "
      + found.countries.filter((c) => c.probability >= 0.01).map((c) => `${c.country} ${whole(100 * c.probability)} %`)
        .join(", ").replace(/^.+$/, "On land in $&.") : "";
    $(".notes").textContent = found ? found.notes.join(" ") : "";
    for (const button of el.querySelectorAll(".downloads button, .near")) button.disabled = !found;
    if (!found) return globe.draw();
    globe.marks = {
      regions: [...found.regions].reverse().map((region) =>
        ({ ...region, rings: region.geometry.coordinates.flat().map((ring) => ring.map(([lon, lat]) => vector(lat, lon))) })),
      draws: found.draws.map(([lat, lon, level]) => [vector(lat, lon), level]).reverse(),
      places: found.places.map((place) => [place.lat, place.lon]), truth: found.truth, guess,
    };
    globe.draw();
    const best = found.places[0], off = best.error_km !== undefined ? `, ${distance(best.error_km)} off` : "";
    say(`${found.near[0]}${off}. Answered in ${found.seconds.toFixed(1)} s.`);
  }

  function pick(index) {
    shown = index;
    const { picture, file, name } = answers[index];
    $(".seen").src = picture || BLANK; $(".seen").alt = picture ? `Image ${file}` : "";
    [...$(".photos").children].forEach((button, i) => button.setAttribute("aria-pressed", i === index));
    guess = null; guessing = $(".mode").value === "guess" && Boolean(answers[index].truth);
    show();
    if (guessing) { globe.marks = null; globe.draw(); say("Where is this? Click on the globe."); }
    else if ($(".mode").value === "guess" && picture) say(`${$(".said").textContent} Its EXIF has no place, so no guess is scored.`);
  }

  model.on("msg:custom", (message, buffers) => {
    if (message.kind === "said") say(message.said);
    if (message.kind === "download") save(new Blob([buffers[0]]), message.name);
    if (message.kind !== "answer") return;
    const old = answers[message.index], again = old && !buffers[0].byteLength;
    message.picture = again ? old.picture
      : buffers[0].byteLength ? URL.createObjectURL(new Blob([buffers[0]], { type: "image/png" })) : "";
    message.seconds ??= old?.seconds ?? 0;
    answers[message.index] = message;
    if (again) { if (message.index === shown) show(); return; }
    if (message.index > 0 && $(".photos").children.length < answers.length) {
      $(".photos").replaceChildren(...answers.map((answer, i) => {
        const button = Object.assign(document.createElement("button"), { textContent: answer.file, title: answer.file });
        button.onclick = () => pick(i);
        return button;
      }));
    }
    pick(message.index);
  });

  async function send(files) {
    forget();
    say("Reading …");
    for (const [file, blob] of files.entries()) {
      const { name, size } = blob, tooMuch = size > 1e6 * fixed.mb || file >= fixed.files;
      const parts = Math.max(1, Math.ceil(size / PART));
      for (let part = 0; part < (tooMuch ? 1 : parts); part++) {
        const bytes = tooMuch ? new ArrayBuffer(0) : await blob.slice(part * PART, (part + 1) * PART).arrayBuffer();
        model.send({ kind: "file", name, size, file, part, parts }, undefined, [bytes]);
      }
    }
  }

  $(".files").onchange = (e) => { send([...e.target.files]); e.target.value = ""; };
  el.addEventListener("dragover", (e) => e.preventDefault());
  el.addEventListener("drop", (e) => {
    e.preventDefault();
    if (e.dataTransfer.files.length && model.get("state").ready) send([...e.dataTransfer.files]);
  });
  $(".place").onsubmit = (e) => {
    e.preventDefault();
    const [lat, lon] = [Number($(".lat").value), Number($(".lon").value)];
    globe.look(lat, lon, globe.zoom);
    chosen(lat, lon);
  };
  $(".words").onsubmit = (e) => {
    e.preventDefault();
    if ($(".text").value.trim()) { forget(); ask({ kind: "text", text: $(".text").value }); }
  };
  $(".new").onclick = () => { forget(); globe.look(globe.lat, globe.lon, 1); ask({ kind: "random" }); };
  $(".mode").onchange = () => {
    forget();
    say($(".mode").value === "explore" ? model.get("state").said : "The image comes first, then your guess, then the answer.");
  };
  const settings = () => {
    const top = Math.max(1, Math.min(fixed.places, Number($(".top").value) || 1));
    $(".top").value = top;
    show();
    model.send({ kind: "settings", decision: $(".decision").value, top_k: top });
  };
  $(".decision").onchange = $(".top").onchange = settings;
  $(".near").onclick = () => {
    const { places, truth, draws } = answers[shown], best = [places[0].lat, places[0].lon];
    const away = draws.map((d) => km(best, d)).sort((a, b) => a - b)[Math.floor(0.9 * draws.length)];
    globe.fly(...best, 0.7 * EARTH_KM / Math.max(70, away, truth ? Math.min(2000, km(best, truth)) : 0));
  };
  $(".far").onclick = () => globe.fly(globe.lat, globe.lon, 1);
  $(".in").onclick = () => globe.look(globe.lat, globe.lon, globe.zoom * 2);
  $(".out").onclick = () => globe.look(globe.lat, globe.lon, globe.zoom / 2);
  $(".downloads").onclick = (e) => {
    const { style } = e.target.dataset;
    const drawn = () => picture(globe.canvas, answers[shown], $(".seen"), $(".regions").textContent.split(". ")[0]);
    if (style === "png") drawn().toBlob((blob) => save(blob, "geoclip.png"));
    else if (style) model.send({ kind: "download", style });
  };

  function update() {
    const { ready, photos, said, progress, decision } = model.get("state");
    say(said);
    $(".progress").hidden = progress === null;
    if (progress !== null) $(".progress").value = progress;
    for (const control of el.querySelectorAll(".controls select, .controls input, .ask button, .ask input, .place button"))
      control.disabled = !ready;
    if (decision) $(".decision").value = decision;
    $(".new").textContent = photos ? "Example photo" : "Random tile";
    $("[data-style=tile]").hidden = photos;
    $(".words").hidden = !photos;
  }
  async function earth() {
    const bytes = model.get("earth");
    if (!bytes?.byteLength) return;
    const image = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
    const held = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
    held.getContext("2d").drawImage(image, 0, 0);
    globe.texture = held.getContext("2d").getImageData(0, 0, image.width, image.height);
    globe.draw();
  }
  function outlines() {
    globe.lines = model.get("outlines").map((line) => line.map(([lon, lat]) => vector(lat, lon)));
    globe.draw();
  }
  $(".decision").replaceChildren(...Object.entries(fixed.decisions).map(([value, text]) => new Option(text, value)));
  $(".top").max = fixed.places;
  model.on("change:state", update);
  model.on("change:earth", earth);
  model.on("change:outlines", outlines);
  show(); update(); earth(); outlines();
  model.send({ kind: "shown" });
  return () => globe.watch.disconnect();
}

function picture(map, found, seen, regions) { // the map, the image and the answers as one canvas
  const side = map.width, unit = side / 640;
  const made = Object.assign(document.createElement("canvas"), { width: side, height: Math.round(side + 150 * unit) });
  const c = made.getContext("2d");
  c.fillStyle = "#fff"; c.fillRect(0, 0, made.width, made.height);
  c.drawImage(map, 0, 0);
  c.imageSmoothingEnabled = false;
  if (seen.naturalWidth) c.drawImage(seen, 10 * unit, side + 10 * unit, 130 * unit, 130 * unit);
  c.fillStyle = "#111";
  const lines = found.places.slice(0, 4).map((p, i) => `${i + 1}  ${found.near[i]}`
    + (p.probability === null ? "" : `, ${percent(p.probability)}`)
    + (p.error_km === undefined ? "" : `, ${distance(p.error_km)} off`));
  [found.file, ...lines, regions, found.notes.at(-1)].forEach((text, i) => {
    c.font = `${i ? "" : "bold "}${13 * unit}px sans-serif`;
    c.fillText(text, 152 * unit, side + (20 + 20 * i) * unit, side - 160 * unit);
  });
  return made;
}

export default { render };
