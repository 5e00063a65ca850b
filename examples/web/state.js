// A picture of the matrices a model keeps between tokens: a row for each layer, a column for each head.

const GAP = 2; // pixels between matrices

/**
 * @param {HTMLCanvasElement} canvas its custom properties --positive and --negative name the colours.
 * @param {{data: Float32Array, sizes: number[]}[]} layers matrices [heads, K, V] of every layer.
 */
export function drawState(canvas, layers) {
  const [heads, K, V] = layers[0].sizes;
  const [width, height] = [heads * (V + GAP) + GAP, layers.length * (K + GAP) + GAP];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const style = getComputedStyle(canvas);
  const [positive, negative] = ["--positive", "--negative"].map((name) => rgb(style.getPropertyValue(name)));
  const context = canvas.getContext("2d");
  layers.forEach(({ data }, layer) => {
    for (let head = 0; head < heads; head++) {
      const matrix = data.subarray(head * K * V, (head + 1) * K * V);
      const pixels = paint(matrix, context.createImageData(V, K), positive, negative);
      context.putImageData(pixels, GAP + head * (V + GAP), GAP + layer * (K + GAP));
    }
  });
}

/** Sign as colour, size against the matrix's own mean square as opacity. */
function paint(matrix, pixels, positive, negative) {
  const square = matrix.reduce((sum, x) => sum + x * x, 0) / matrix.length;
  const unit = 1 / (2.5 * Math.sqrt(square) || 1);
  matrix.forEach((x, i) => {
    pixels.data.set(x < 0 ? negative : positive, 4 * i);
    pixels.data[4 * i + 3] = 255 * Math.min(1, Math.abs(x) * unit);
  });
  return pixels;
}

/** [r, g, b] of "#rrggbb". */
function rgb(colour) {
  return colour
    .trim()
    .slice(1)
    .match(/../g)
    .map((pair) => parseInt(pair, 16));
}
