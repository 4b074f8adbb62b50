// Masks as PNG, of one bit per pixel: a browser's own would take four bytes for each, and a second for a large one.

const CRCS = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? 0xedb88320 ^ (byte >>> 1) : byte >>> 1;
  return byte;
});

/** @param {import("./mask.js").Mask} mask */
export async function encoded({ width, height, data }) {
  const stride = Math.ceil(width / 8) + 1;
  const rows = new Uint8Array(stride * height);
  for (let y = 0; y < height; y++) {
    const row = y * stride + 1; // each begins with its filter, 0
    for (let x = 0, at = y * width; x < width; x++, at++) if (data[at]) rows[row + (x >> 3)] |= 0x80 >> (x & 7);
  }
  const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 1); // bits; grey, deflate, no interlacing are zeros
  return new Blob(
    [
      Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a),
      chunk("IHDR", new Uint8Array(header.buffer)),
      chunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())),
      chunk("IEND", new Uint8Array(0)),
    ],
    { type: "image/png" },
  );
}

/**
 * A mask that the server sent: 128 or more of 255 marks. box: outside it nothing is.
 * @param {Blob} png @param {number} width @param {number} height @param {import("./mask.js").Box} box
 */
export async function decoded(png, width, height, { left, top, right, bottom }) {
  const data = new Uint8Array(width * height);
  const [wide, high] = [right - left, bottom - top];
  const bitmap = await createImageBitmap(png, left, top, wide, high, { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(wide, high);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data: pixels } = context.getImageData(0, 0, wide, high);
  for (let y = 0; y < high; y++) {
    const row = (top + y) * width + left;
    for (let x = 0; x < wide; x++) data[row + x] = pixels[(y * wide + x) * 4] >> 7;
  }
  return { width, height, data };
}

/** @param {string} name @param {Uint8Array} content */
function chunk(name, content) {
  const bytes = new Uint8Array(content.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(name), 4);
  bytes.set(content, 8);
  let crc = -1;
  for (let at = 4; at < content.length + 8; at++) crc = CRCS[(crc ^ bytes[at]) & 255] ^ (crc >>> 8);
  view.setUint32(content.length + 8, ~crc >>> 0);
  return bytes;
}
