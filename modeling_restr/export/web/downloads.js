// Masks as PNG files, several of them in a ZIP file.

const PNG_SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, number) => {
  let value = number;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/**
 * Encodes a mask as PNG of one channel, 255 inside and 0 outside.
 * @param {Uint8Array} mask 1 inside and 0 outside, row by row.
 * @returns {Promise<Uint8Array>}
 */
export async function encodeMask(mask, width, height) {
  const rows = new Uint8Array((width + 1) * height); // each row starts with its filter: 0, none
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) rows[y * (width + 1) + 1 + x] = mask[y * width + x] ? 255 : 0;
  }
  const header = [...toBigEndian(width), ...toBigEndian(height), 8, 0, 0, 0, 0]; // 8 bits, grey
  const chunks = [makeChunk("IHDR", header), makeChunk("IDAT", await compress(rows)), makeChunk("IEND", [])];
  return concatenate([PNG_SIGNATURE, ...chunks]);
}

/**
 * Packs files into a ZIP file, without compression.
 * @param {{name: string, content: Uint8Array}[]} files
 * @returns {Uint8Array}
 */
export function pack(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, content } of files) {
    const encodedName = new TextEncoder().encode(name);
    const size = uint32(content.length);
    // version 2.0, name in UTF-8, no compression, 1980-01-01 00:00
    const kind = [...uint16(20), ...uint16(0x800), ...uint16(0), ...uint16(0), ...uint16(0x21)];
    const description = [...kind, ...uint32(computeCRC(content)), ...size, ...size, ...uint16(encodedName.length)];
    const header = [...uint32(0x04034b50), ...description, ...uint16(0), ...encodedName];
    // no extra field, no comment, first disk, no attributes
    const place = [...uint16(0), ...uint16(0), ...uint16(0), ...uint16(0), ...uint32(0), ...uint32(offset)];
    directory.push(...uint32(0x02014b50), ...uint16(20), ...description, ...place, ...encodedName);
    parts.push(Uint8Array.from(header), content);
    offset += header.length + content.length;
  }
  const count = uint16(files.length);
  const sizes = [...count, ...count, ...uint32(directory.length), ...uint32(offset)];
  const end = [...uint32(0x06054b50), ...uint16(0), ...uint16(0), ...sizes, ...uint16(0)];
  return concatenate([...parts, Uint8Array.from([...directory, ...end])]);
}

/** Lets the browser save a file. */
export function save(content, name, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** The file name of a sentence's mask: "1_the-upper-dog.png". */
export function nameMask(number, text) {
  const words = text.toLowerCase().replace(/[^\p{L}\p{N}_]+/gu, "-").replace(/^-+|-+$/g, "");
  return `${number}_${[...words].slice(0, 40).join("")}.png`;
}

function makeChunk(type, content) {
  const body = concatenate([new TextEncoder().encode(type), content]);
  return concatenate([toBigEndian(content.length), body, toBigEndian(computeCRC(body))]);
}

/** Four bytes, the high one first. */
function toBigEndian(value) {
  return uint32(value).reverse();
}

/** Two bytes, the low one first. */
function uint16(value) {
  return [value & 0xff, (value >>> 8) & 0xff];
}

/** Four bytes, the low one first. */
function uint32(value) {
  return [...uint16(value & 0xffff), ...uint16(value >>> 16)];
}

function concatenate(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    whole.set(part, offset);
    offset += part.length;
  }
  return whole;
}

async function compress(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function computeCRC(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}
