"use strict";
// The slide viewer, the scale bar, questions and the tiles that answers depend on.

const get = (id) => document.getElementById(id);
const MARK = "#c81e3a";
const BAR_PX = 130; // longest scale bar
const TILE_PX = 256;

let slide = null; // {name, width_px, height_px, mpp}
let shown = null; // {slide, region, squares, side}: what is drawn over the slide

const viewer = OpenSeadragon({
  element: get("viewer"),
  drawer: "canvas",
  showNavigationControl: false,
  maxZoomPixelRatio: 4,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.4,
});

async function fetched(address, options) {
  const reply = await fetch(address, options);
  const content = await reply.json();
  if (!reply.ok) throw new Error(content.error ? content.error.message : reply.statusText);
  return content;
}

function say(text, isError = false) {
  get("status").textContent = text;
  get("status").className = isError ? "error" : "";
}

async function open(name) {
  slide = await fetched(`slide?${new URLSearchParams({ name })}`);
  const longer = Math.max(slide.width_px, slide.height_px);
  const scale = slide.mpp === null
    ? "resolution unknown"
    : `${slide.mpp.toPrecision(3)} µm per pixel`;
  get("about").textContent =
    `${slide.width_px.toLocaleString("en")} x ${slide.height_px.toLocaleString("en")} px, ${scale}`;
  get("name").value = name;
  await new Promise((resolve, reject) => {
    viewer.addOnceHandler("open", resolve);
    viewer.addOnceHandler("open-failed", (event) => reject(new Error(event.message)));
    viewer.open({
      width: slide.width_px,
      height: slide.height_px,
      tileSize: TILE_PX,
      tileOverlap: 0,
      minLevel: 0,
      maxLevel: Math.ceil(Math.log2(longer)),
      getTileUrl: (level, column, row) =>
        `tile?${new URLSearchParams({ name, level, column, row })}`,
    });
  });
}

function view() {
  // The visible part of the slide: left, top, right, bottom in level-0 pixels.
  const item = viewer.world.getItemAt(0);
  const box = item.viewportToImageRectangle(viewer.viewport.getBounds());
  return [
    Math.max(0, Math.round(box.x)),
    Math.max(0, Math.round(box.y)),
    Math.min(slide.width_px, Math.round(box.x + box.width)),
    Math.min(slide.height_px, Math.round(box.y + box.height)),
  ];
}

function draw() {
  const item = viewer.world.getItemAt(0);
  if (!item) return;
  const canvas = get("marks");
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const corner = (x, y) => item.imageToViewerElementCoordinates(new OpenSeadragon.Point(x, y));
  const outline = (left, top, right, bottom) => {
    const [first, last] = [corner(left, top), corner(right, bottom)];
    pen.strokeRect(first.x, first.y, last.x - first.x, last.y - first.y);
    return [first.x, first.y, last.x - first.x, last.y - first.y];
  };
  if (shown && shown.slide === slide.name) {
    pen.lineWidth = 2;
    if (shown.region) {
      pen.strokeStyle = "#0b4bb3";
      pen.setLineDash([8, 5]);
      outline(...shown.region);
      pen.setLineDash([]);
    }
    pen.strokeStyle = MARK;
    pen.fillStyle = "rgba(200, 30, 58, 0.18)";
    for (const [x, y] of shown.squares) {
      pen.fillRect(...outline(x, y, x + shown.side, y + shown.side));
    }
  }
  drawScale(item.viewportToImageZoom(viewer.viewport.getZoom(true)));
}

function drawScale(zoom) {
  // zoom: pixels of the screen per level-0 pixel
  const unit = slide.mpp === null ? 1 : slide.mpp;
  const most = (BAR_PX / zoom) * unit;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].map((factor) => factor * power).find((value) => value <= most);
  get("scale").querySelector("i").style.width = `${(length / unit) * zoom}px`;
  const text = slide.mpp === null
    ? `${length.toLocaleString("en")} px`
    : length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  get("scale").querySelector("span").textContent = text;
}

function snapshot() {
  const small = document.createElement("canvas");
  const source = viewer.drawer.canvas;
  small.width = 264;
  small.height = 200;
  const scale = Math.max(small.width / source.width, small.height / source.height);
  const [width, height] = [source.width * scale, source.height * scale];
  const pen = small.getContext("2d");
  pen.fillStyle = "#f4f5f7";
  pen.fillRect(0, 0, small.width, small.height);
  pen.drawImage(
    source, (small.width - width) / 2, (small.height - height) / 2, width, height);
  return small.toDataURL("image/jpeg", 0.85);
}

function size(region) {
  if (!region) return "the whole slide";
  const [left, top, right, bottom] = region;
  const sides = [right - left, bottom - top].map((length) =>
    slide.mpp === null ? length : Number(((length * slide.mpp) / 1000).toPrecision(2)));
  const unit = slide.mpp === null ? "px" : "mm";
  return `${sides.join(" x ")} ${unit} at (${left.toLocaleString("en")}, ${top.toLocaleString("en")})`;
}

function entry(about, question) {
  const item = document.createElement("li");
  const picture = new Image();
  picture.src = about.picture;
  picture.alt = `${about.slide}: ${about.size}`;
  const texts = document.createElement("div");
  const lines = {};
  for (const kind of ["what", "asked", "answer", "evidence"]) {
    lines[kind] = document.createElement("p");
    lines[kind].className = kind;
    texts.append(lines[kind]);
  }
  lines.what.textContent = `${about.slide}, ${about.size}`;
  lines.asked.textContent = question;
  lines.answer.textContent = "…";
  item.append(picture, texts);
  get("answers").prepend(item);
  return { item, texts, lines };
}

async function ask(question) {
  const part = document.querySelector("input[name=part]:checked").value;
  if (part === "slide") viewer.viewport.goHome(true);
  const region = part === "view" ? view() : null;
  const about = { slide: slide.name, size: size(region), picture: snapshot() };
  const { texts, lines } = entry(about, question);
  const body = { slide: slide.name, question, region };
  const post = (more) => fetched("ask", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, ...more }),
  });
  shown = { slide: about.slide, region, squares: [], side: 0 };
  draw();
  try {
    say("Reading the slide; the first question about a slide may take minutes.");
    const reply = await post({});
    lines.answer.textContent = reply.answer || "(no answer)";
    say("Looking for the tiles that the answer depends on.");
    const { evidence } = await post({ evidence: true });
    lines.evidence.textContent = `Evidence: ${evidence.summary}.`;
    lines.evidence.classList.toggle("told", evidence.told);
    const marks = { slide: about.slide, region, squares: evidence.squares, side: evidence.side };
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = evidence.told ? "Show evidence" : "Show on the slide";
    button.addEventListener("click", () => show(marks).catch((error) => say(error.message, true)));
    texts.append(button);
    shown = marks;
    draw();
    say("");
  } catch (error) {
    if (lines.answer.textContent === "…") lines.answer.textContent = "(not answered)";
    say(error.message, true);
  }
}

async function show(marks) {
  get("frame").scrollIntoView({ block: "nearest" });
  if (slide.name !== marks.slide) await open(marks.slide);
  shown = marks;
  const item = viewer.world.getItemAt(0);
  if (marks.region) {
    const [left, top, right, bottom] = marks.region;
    viewer.viewport.fitBounds(item.imageToViewportRectangle(left, top, right - left, bottom - top));
  } else {
    viewer.viewport.goHome();
  }
  draw();
}

get("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = get("question").value.trim();
  if (!question || !slide) return;
  get("ask").disabled = true;
  get("question").value = "";
  await ask(question);
  get("ask").disabled = false;
});
get("name").addEventListener("change", (event) => {
  shown = null;
  open(event.target.value).catch((error) => say(error.message, true));
});
get("in").addEventListener("click", () => viewer.viewport.zoomBy(2).applyConstraints());
get("out").addEventListener("click", () => viewer.viewport.zoomBy(0.5).applyConstraints());
get("whole").addEventListener("click", () => viewer.viewport.goHome());
for (const event of ["update-viewport", "resize", "animation"]) viewer.addHandler(event, draw);

fetched("slides").then((names) => {
  get("name").append(...names.map((name) => new Option(name, name)));
  if (names.length) return open(names[0]);
  return say("There is no slide in the folder.", true);
}).catch((error) => say(error.message, true));
