// A network with one hidden layer of ReLUs, trained by Adam on all rows at once: what `torch.nn` does, in plain loops.
"use strict";

/** Weights as `torch.nn.Linear` draws them: uniform within 1/sqrt(inputs). */
function newNetwork(inputs, hidden, outputs) {
  const draw = (count, fan) => Float64Array.from({ length: count }, () => (2 * Math.random() - 1) / Math.sqrt(fan));
  const shape = { inputs, hidden, outputs };
  return {
    ...shape,
    parameters: [draw(inputs * hidden, inputs), draw(hidden, inputs), draw(hidden * outputs, hidden), draw(outputs, hidden)],
    moments: null,
    step: 0,
  };
}

/** Hidden activations and outputs of one row that begins at `start` of `rows`. Weights are (inputs, outputs). */
function forward(net, rows, start, h, o) {
  const [w1, b1, w2, b2] = net.parameters;
  h.set(b1);
  for (let i = 0; i < net.inputs; i++) {
    const x = rows[start + i];
    if (x !== 0) for (let j = 0, at = i * net.hidden; j < net.hidden; j++) h[j] += x * w1[at + j];
  }
  o.set(b2);
  for (let j = 0; j < net.hidden; j++) {
    if (h[j] <= 0) h[j] = 0;
    else for (let k = 0, at = j * net.outputs; k < net.outputs; k++) o[k] += h[j] * w2[at + k];
  }
}

/** One step of Adam on the mean cross-entropy with soft labels. */
function trainStep(net, rows, labels, lr) {
  const { inputs, hidden, outputs, parameters } = net;
  const n = labels.length / outputs, w2 = parameters[2];
  const [g1, gb1, g2, gb2] = parameters.map((p) => new Float64Array(p.length));
  const h = new Float64Array(hidden), o = new Float64Array(outputs), back = new Float64Array(hidden);
  for (let row = 0; row < n; row++) {
    forward(net, rows, row * inputs, h, o);
    const top = Math.max(...o);
    let total = 0, mass = 0;
    for (let k = 0; k < outputs; k++) { o[k] = Math.exp(o[k] - top); total += o[k]; mass += labels[row * outputs + k]; }
    for (let k = 0; k < outputs; k++) { o[k] = (mass * o[k] / total - labels[row * outputs + k]) / n; gb2[k] += o[k]; }
    for (let j = 0; j < hidden; j++) {
      back[j] = 0;
      if (h[j] === 0) continue;
      for (let k = 0, at = j * outputs; k < outputs; k++) { back[j] += o[k] * w2[at + k]; g2[at + k] += h[j] * o[k]; }
      gb1[j] += back[j];
    }
    for (let i = 0; i < inputs; i++) {
      const x = rows[row * inputs + i];
      for (let j = 0, at = i * hidden; j < hidden; j++) g1[at + j] += x * back[j];
    }
  }
  adam(net, [g1, gb1, g2, gb2], lr);
}

function adam(net, gradients, lr) {
  net.moments ??= gradients.map((g) => [new Float64Array(g.length), new Float64Array(g.length)]);
  net.step += 1;
  const first = 1 - 0.9 ** net.step, second = 1 - 0.999 ** net.step;
  gradients.forEach((g, which) => {
    const [m, v] = net.moments[which], p = net.parameters[which];
    for (let i = 0; i < g.length; i++) {
      m[i] = 0.9 * m[i] + 0.1 * g[i];
      v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
      p[i] -= (lr * (m[i] / first)) / (Math.sqrt(v[i] / second) + 1e-8);
    }
  });
}

/** Share of rows whose largest output is their label. */
function accuracy(net, rows, labels) {
  const h = new Float64Array(net.hidden), o = new Float64Array(net.outputs);
  let right = 0;
  labels.forEach((label, row) => {
    forward(net, rows, row * net.inputs, h, o);
    right += o.indexOf(Math.max(...o)) === label;
  });
  return right / labels.length;
}

const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/** What `_scaled` has written. */
function numbersOf({ worth, integers }) {
  return Float64Array.from(new Int16Array(bytesOf(integers).buffer), (v) => v * worth);
}

/** Each image minus its mean, over its norm, times the whitening matrix: the space of the distilled set. */
function whitened(pixels, matrix, size) {
  const out = new Float64Array(pixels.length), row = new Float64Array(size);
  for (let start = 0; start < pixels.length; start += size) {
    let mean = 0, norm = 0;
    for (let i = 0; i < size; i++) mean += pixels[start + i] / size;
    for (let i = 0; i < size; i++) norm += (row[i] = pixels[start + i] - mean) ** 2;
    norm = Math.sqrt(norm) || 1;
    for (let i = 0; i < size; i++)
      for (let j = 0, x = row[i] / norm; j < size; j++) out[start + j] += x * matrix[i * size + j];
  }
  return out;
}
