// The page of `muse serve`: it asks the server's own API, as any other client does.

const $ = (id) => document.getElementById(id);
const STEP = 16; // pixels by which a picture grows
const PARTIAL = 12; // pictures that are shown on the way
const AT = [10, 25, 50, 75, 100]; // iterations of a change that are shown
const NAMES = { draw: "Draw", repaint: "Repaint", extend: "Extend", change: "Change", vary: "Vary" };

const state = {
  tool: "draw",
  shown: null, // of the history
  history: [],
  grow: { left: 0, top: 0, right: 0, bottom: 0 },
  stages: [], // what a change went through
  running: null, // an AbortController
  side: 256, // of the model's own pictures
};
const picture = $("picture").getContext("2d");
const mask = $("mask").getContext("2d");

// Asking ----------------------------------------------------------------------------------------

async function ask(path, body, onPartial) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  if (!(body instanceof FormData) && body) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  state.running = new AbortController();
  const answer = await fetch(path, {
    method: body ? "POST" : "GET", headers, body, signal: state.running.signal,
  });
  if (answer.status === 401 && askForToken()) return ask(path, body, onPartial);
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  if (!answer.headers.get("Content-Type").startsWith("text/event-stream")) return answer.json();
  let result = null;
  for await (const event of events(answer.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type.endsWith("partial_image")) await onPartial(event);
    if (event.type.endsWith("completed")) result = { data: [event] };
  }
  if (!result) throw new Error("the server ended its answer too early: try again");
  return result;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((each) => each.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

function askForToken() {
  const token = prompt("This server wants a token:");
  if (token) sessionStorage.setItem("token", token.trim());
  return Boolean(token);
}

// Drawing ---------------------------------------------------------------------------------------

function settings() {
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  const asked = { prompt: $("prompt").value.trim(), seed };
  if ($("negative").value.trim()) asked.negative_texts = $("negative").value.trim();
  if ($("preset").value) asked.preset = $("preset").value;
  return asked;
}

async function go(asked = settings(), tool = state.tool, source = state.shown, mark = maskBlob) {
  if (state.running) return;
  if (tool !== "draw" && !source) return say("Draw or open a picture first.", true);
  if (tool !== "vary" && !asked.prompt) {
    $("prompt").focus();
    return say("Write what the picture is to show.", true);
  }
  const details = { tool, source, asked: { ...asked } };
  busy(true);
  const began = performance.now();
  try {
    let result;
    const live = { stream: true, partial_images: PARTIAL };
    if (tool === "draw") {
      result = await ask("v1/images/generations", { ...asked, ...live }, partial);
    } else {
      const form = new FormData();
      const put = (fields) => Object.entries(fields).forEach(([name, value]) => form.set(name, value));
      put(asked);
      form.set("image", await (await fetch(source.png)).blob(), "picture.png");
      if (tool === "repaint") {
        details.mask = await mark(source);
        if (!details.mask) throw new Error("Paint over what is to be repainted first.");
        form.set("mask", details.mask, "mask.png");
        put(live);
      } else if (tool === "extend") {
        details.grow = details.grow ?? { ...state.grow };
        if (!Object.values(details.grow).some(Boolean)) throw new Error("Drag an edge outwards first.");
        put({ edit: "outpaint", ...details.grow, ...live });
      } else if (tool === "change") {
        put({ edit: "free", at: JSON.stringify(AT) });
      } else {
        put({ strength: $("strength").value, ...live });
      }
      result = await ask(tool === "vary" ? "v1/images/variations" : "v1/images/edits", form, partial);
    }
    const pngs = result.data.map((each) => `data:image/png;base64,${each.b64_json}`);
    details.seconds = (performance.now() - began) / 1000;
    if (tool === "change") state.stages = [source.png, ...pngs];
    remember({ ...details, png: pngs.at(-1), stages: tool === "change" ? state.stages : [] });
    say(`Done in ${details.seconds.toFixed(1)} s.`);
  } catch (error) {
    if (state.shown) await show(state.shown);
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    busy(false);
  }
}

async function partial(event) {
  $("progress").value = (event.partial_image_index + 1) / (PARTIAL + 1);
  await paint(`data:image/png;base64,${event.b64_json}`);
}

async function paint(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  for (const canvas of [$("picture"), $("mask")]) {
    if (canvas.width !== image.naturalWidth || canvas.height !== image.naturalHeight) {
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
    }
  }
  picture.drawImage(image, 0, 0);
  $("empty").hidden = true;
  $("frame").classList.add("full");
  placeHandles();
}

function busy(on) {
  if (!on) state.running = null;
  $("go").disabled = on;
  $("stop").disabled = !on;
  $("again").disabled = on || !state.shown?.asked;
  document.body.setAttribute("aria-busy", on);
  if (on) { $("progress").value = 0; say("Drawing …"); } else $("progress").value = 0;
}

function say(text, wrong = false) {
  $("said").textContent = text;
  $("said").classList.toggle("error", wrong);
}

// History ---------------------------------------------------------------------------------------

function remember(item) {
  state.history.unshift(item);
  const button = document.createElement("button");
  const image = new Image();
  image.src = item.png;
  image.alt = item.asked?.prompt ?? item.name;
  button.title = describe(item);
  button.append(image);
  button.onclick = () => { if (!state.running) show(item, true); };
  item.button = button;
  const row = document.createElement("li");
  row.append(button);
  $("history").prepend(row);
  return show(item);
}

function describe(item) {
  if (!item.asked) return item.name;
  const { prompt, seed, preset, negative_texts: negative } = item.asked;
  const parts = [NAMES[item.tool], `“${prompt}”`, `seed ${seed}`];
  if (preset) parts.push(`preset ${preset}`);
  if (negative) parts.push(`not “${negative}”`);
  return parts.join(" · ");
}

async function show(item, withSettings = false) {
  state.shown = item;
  state.grow = { left: 0, top: 0, right: 0, bottom: 0 };
  state.stages = item.stages ?? [];
  await paint(item.png);
  clearMask();
  showGrow();
  for (const each of state.history) each.button.setAttribute("aria-current", each === item);
  $("about").textContent = describe(item);
  $("again").disabled = !item.asked;
  $("download").href = item.png;
  $("download").download = `muse-${item.asked?.seed ?? "picture"}.png`;
  const stage = $("stage");
  stage.disabled = state.stages.length < 2;
  stage.max = Math.max(0, state.stages.length - 1);
  stage.value = stage.max;
  showNumbers();
  if (withSettings && item.asked) {
    $("prompt").value = item.asked.prompt;
    $("negative").value = item.asked.negative_texts ?? "";
    $("preset").value = item.asked.preset ?? "";
  }
}

function again() {
  const item = state.shown;
  if (!item?.asked || state.running) return;
  if (item.grow) state.grow = { ...item.grow };
  go(item.asked, item.tool, item.source, async () => item.mask);
}

async function opened(file) {
  if (!file) return;
  const url = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = failed;
    reader.readAsDataURL(file);
  });
  try {
    await remember({ png: url, name: file.name });
    if (state.tool === "draw") choose("repaint");
  } catch {
    say(`${file.name} is no picture that can be shown.`, true);
  }
}

// The mask --------------------------------------------------------------------------------------

let painter = null;  // the pointer that paints: one finger, not two
let last = null;

function place(event) {
  const box = $("mask").getBoundingClientRect();
  const scale = $("mask").width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale, scale];
}

function stroke(event) {
  const [x, y, scale] = place(event);
  const [fromX, fromY] = last ?? [x, y];
  const style = getComputedStyle(document.documentElement).getPropertyValue("--mask");
  mask.globalCompositeOperation = erasing(event) ? "destination-out" : "source-over";
  mask.strokeStyle = `rgb(${style})`;
  mask.lineWidth = $("brush").value * scale;
  mask.lineCap = mask.lineJoin = "round";
  mask.beginPath();
  mask.moveTo(fromX, fromY);
  mask.lineTo(x + 0.01, y);
  mask.stroke();
  last = [x, y];
}

const erasing = (event) => $("erase").getAttribute("aria-pressed") === "true" || event.buttons === 2;
const clearMask = () => mask.clearRect(0, 0, $("mask").width, $("mask").height);

// A PNG that is transparent where it is to be repainted; null where nothing was painted.
async function maskBlob() {
  const { width, height } = $("mask");
  const painted = mask.getImageData(0, 0, width, height);
  const out = new ImageData(width, height);
  let some = false;
  for (let i = 3; i < painted.data.length; i += 4) {
    const inside = painted.data[i] > 127;
    out.data[i] = inside ? 0 : 255;
    some ||= inside;
  }
  if (!some) return null;
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(out, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

// Extending -------------------------------------------------------------------------------------

function placeHandles() {
  const { offsetWidth: width, offsetHeight: height } = $("picture");
  const scale = width / $("picture").width;
  const by = Object.fromEntries(Object.entries(state.grow).map(([side, pixels]) => [side, pixels * scale]));
  const grown = $("grown").style;
  grown.left = `${-by.left}px`;
  grown.top = `${-by.top}px`;
  grown.width = `${width + by.left + by.right}px`;
  grown.height = `${height + by.top + by.bottom}px`;
  const at = {
    left: [-by.left, height / 2], right: [width + by.right, height / 2],
    top: [width / 2, -by.top], bottom: [width / 2, height + by.bottom],
  };
  for (const edge of document.querySelectorAll("#frame i")) {
    const [x, y] = at[edge.dataset.edge];
    edge.style.left = `${x}px`;
    edge.style.top = `${y}px`;
  }
}

function showGrow() {
  for (const input of document.querySelectorAll("[data-side]")) input.value = state.grow[input.dataset.side];
  placeHandles();
}

function drag(edge, event) {
  const side = edge.dataset.edge;
  const scale = $("picture").width / $("picture").offsetWidth;
  const start = { x: event.clientX, y: event.clientY, grow: state.grow[side] };
  const sign = side === "left" || side === "top" ? -1 : 1;
  edge.setPointerCapture(event.pointerId);
  edge.onpointermove = (move) => {
    const by = side === "left" || side === "right" ? move.clientX - start.x : move.clientY - start.y;
    const pixels = start.grow + sign * by * scale;
    state.grow[side] = Math.min(4 * state.side, Math.max(0, STEP * Math.round(pixels / STEP)));
    showGrow();
  };
  edge.onpointerup = edge.onpointercancel = () => { edge.onpointermove = null; };
}

// The rest --------------------------------------------------------------------------------------

function choose(tool) {
  state.tool = tool;
  document.body.dataset.tool = tool;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", tab.dataset.tool === tool);
  }
  $("go").textContent = NAMES[tool];
  placeHandles();
}

function showNumbers() {
  for (const output of document.querySelectorAll("output")) {
    const input = $(output.htmlFor.value);
    output.textContent = input.id === "stage" ? ["the picture", ...AT][Number(input.value)] ?? "" : input.value;
  }
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("theme", name);
}

$("settings").onsubmit = (event) => { event.preventDefault(); go(); };
$("stop").onclick = () => state.running?.abort();
$("again").onclick = again;
$("clear").onclick = clearMask;
$("erase").onclick = () => $("erase").setAttribute("aria-pressed", $("erase").getAttribute("aria-pressed") !== "true");
$("open").onchange = (event) => opened(event.target.files[0]);
$("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
$("settings").oninput = showNumbers;
$("stage").oninput = async () => {
  const png = state.stages[Number($("stage").value)];
  await paint(png);
  $("download").href = png;
};
for (const tab of document.querySelectorAll("[role=tab]")) tab.onclick = () => choose(tab.dataset.tool);
for (const input of document.querySelectorAll("[data-side]")) {
  input.onchange = () => {
    state.grow[input.dataset.side] = Math.max(0, STEP * Math.round(Number(input.value) / STEP));
    showGrow();
  };
}
for (const edge of document.querySelectorAll("#frame i")) edge.onpointerdown = (event) => drag(edge, event);
$("mask").onpointerdown = (event) => {
  if (!state.shown || state.running || painter !== null) return;
  painter = event.pointerId;
  $("mask").setPointerCapture(painter);
  stroke(event);
};
$("mask").onpointermove = (event) => { if (event.pointerId === painter) stroke(event); };
$("mask").onpointerup = $("mask").onpointercancel = (event) => {
  if (event.pointerId === painter) painter = last = null;
};
$("mask").oncontextmenu = (event) => event.preventDefault();
window.onresize = placeHandles;
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => { event.preventDefault(); opened(event.dataTransfer.files[0]); };
document.onkeydown = (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") return go();
  if (event.key === "Escape") return state.running?.abort();
  if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const tool = Object.keys(NAMES)[Number(event.key) - 1];
  const at = state.history.indexOf(state.shown);
  const near = { ArrowLeft: state.history[at - 1], ArrowRight: state.history[at + 1] }[event.key];
  if (tool) choose(tool);
  else if (near && !state.running) show(near, true);
  else if (event.key === "[" || event.key === "]") {
    $("brush").value = Number($("brush").value) + (event.key === "]" ? 4 : -4);
    showNumbers();
  } else if (event.key === "e") $("erase").click();
  else if (event.key === "a") again();
  else if (event.key === "d" && state.shown) $("download").click();
};

theme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
choose("draw");
showNumbers();
try {
  const [model] = (await ask("v1/models")).data;
  state.running = null;
  $("model").textContent = model.id;
  state.side = model.image_size?.[0] ?? state.side;
  for (const name of ["", ...(model.presets ?? []).filter((each) => each !== "default")]) $("preset").add(new Option(name || "the model's own", name));
} catch (error) {
  state.running = null;
  say(error.message, true);
}
