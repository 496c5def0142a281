const held = JSON.parse(document.getElementById("held").textContent);
const size = held.side ** 2, classes = held.classes.length, STEPS = 100, HIDDEN = 64;
const matrix = numbersOf(held.whitening);
const pool = bytesOf(held.pool), test = whitened(bytesOf(held.test), matrix, size);
const runs = []; // {kind, points}
const COLOURS = { distilled: "--accent", real: "--amber", many: "--green" };

const oneHot = (labels) => Float64Array.from({ length: labels.length * classes }, (_, i) => +(labels[(i / classes) | 0] === i % classes));

/** `each` random images of every class, or as many as there are. */
function drawReal(each) {
  const chosen = [];
  for (let label = 0; label < classes; label++) {
    const own = held.pool_labels.flatMap((found, index) => (found === label ? [index] : []));
    for (let k = 0; k < each && own.length; k++) chosen.push(...own.splice(Math.floor(Math.random() * own.length), 1));
  }
  const pixels = new Uint8Array(chosen.length * size);
  chosen.forEach((index, row) => pixels.set(pool.subarray(index * size, (index + 1) * size), row * size));
  return { pixels, rows: whitened(pixels, matrix, size), labels: oneHot(chosen.map((index) => held.pool_labels[index])) };
}

// As many as the distilled ones, class by class.
const perClass = bytesOf(held.drawn).length / size / classes;
const distilled = { pixels: bytesOf(held.drawn), rows: numbersOf(held.images), labels: numbersOf(held.labels) };

function show(id, pixels) {
  const strip = document.getElementById(id);
  strip.replaceChildren();
  for (let start = 0; start < pixels.length; start += size) {
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    canvas.width = canvas.height = held.side;
    const picture = pen.createImageData(held.side, held.side);
    for (let i = 0; i < size; i++) picture.data.set([...Array(3).fill(pixels[start + i]), 255], 4 * i);
    pen.putImageData(picture, 0, 0);
    canvas.title = held.classes[Math.floor(start / size / perClass)] ?? "";
    strip.append(canvas);
  }
}

function chart() {
  const canvas = document.getElementById("chart"), pen = canvas.getContext("2d"), look = getComputedStyle(document.body);
  const { width, height } = canvas, colour = (name) => look.getPropertyValue(name);
  const x = (step) => 44 + (step / STEPS) * (width - 56), y = (value) => height - 28 - value * (height - 40);
  pen.clearRect(0, 0, width, height);
  pen.font = "13px system-ui, sans-serif";
  for (let tenth = 0; tenth <= 8; tenth += 2) {
    pen.strokeStyle = colour("--line"); pen.fillStyle = colour("--soft");
    pen.beginPath(); pen.moveTo(44, y(tenth / 10)); pen.lineTo(width - 12, y(tenth / 10)); pen.stroke();
    pen.fillText(`${tenth * 10} %`, 4, y(tenth / 10) + 4);
  }
  pen.fillText("steps of Adam", width - 100, height - 8);
  for (const run of runs) {
    pen.strokeStyle = colour(COLOURS[run.kind]); pen.lineWidth = 2;
    pen.beginPath();
    run.points.forEach((value, index) => pen.lineTo(x(index * 5), y(value)));
    pen.stroke();
  }
}

function start(kind, set) {
  const net = newNetwork(size, HIDDEN, classes), run = { kind, points: [accuracy(net, test, held.test_labels)] };
  runs.push(run);
  const said = document.getElementById(`said_${kind}`);
  (function onwards() {
    for (let k = 0; k < 5; k++) trainStep(net, set.rows, set.labels, held.lr);
    run.points.push(accuracy(net, test, held.test_labels));
    said.textContent = `${(100 * run.points.at(-1)).toFixed(1)} % after ${net.step} steps`;
    chart();
    if (net.step < STEPS) setTimeout(onwards);
    else said.dataset.done = run.points.at(-1);
  })();
}

document.getElementById("train_distilled").addEventListener("click", () => start("distilled", distilled));
document.getElementById("train_real").addEventListener("click", () => {
  const set = drawReal(perClass);
  show("real", set.pixels);
  start("real", set);
});
document.getElementById("train_many").addEventListener("click", () => start("many", drawReal(Infinity)));
document.getElementById("clear").addEventListener("click", () => { runs.length = 0; chart(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", chart);
show("distilled", distilled.pixels);
show("real", drawReal(perClass).pixels);
chart();
