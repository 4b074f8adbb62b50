// The server's /v1, and nothing else of it.

/** @typedef {{phase: "queued" | "loading" | "running", model: string, step: number, steps: number}} Progress */
/** @typedef {{onJob?: (id: string) => void, onProgress?: (progress: Progress) => void, signal?: AbortSignal}} Watch */
/** @typedef {{name: string, place: "gpu" | "memory" | "parked" | "disk", state: string, queue: number}} ModelStatus */

/** The server refused or failed: code is the API's. */
export class ServerError extends Error {
  /** @param {string} code @param {string} message @param {string} [field] */
  constructor(code, message, field) {
    super(message);
    this.code = code;
    this.field = field;
  }
}

/** The server asks for a key, and this browser is not logged in, or not any more. */
export class LoggedOut extends Error {}

/** Nobody answers. */
export class Unreachable extends Error {}

/** @param {string} path @param {RequestInit} [init] @returns {Promise<Response>} */
async function send(path, init) {
  let answer;
  try {
    answer = await fetch(path, init);
  } catch (error) {
    if (init?.signal?.aborted) throw error;
    throw new Unreachable("the server does not answer");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) throw new LoggedOut("the server asks for a key");
  const text = await answer.text();
  let told;
  try {
    told = JSON.parse(text).error;
  } catch {
    told = undefined; // a proxy's own page
  }
  throw new ServerError(told?.code ?? `http_${answer.status}`, told?.message ?? text.slice(0, 200), told?.field);
}

/** @param {Record<string, unknown>} fields */
function form(fields) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined || value === null) continue;
    body.append(name, value instanceof Blob ? value : typeof value === "string" ? value : JSON.stringify(value));
  }
  return body;
}

/** Keeps a picture on the server for a while. @param {Blob} picture @returns {Promise<string>} its id */
export async function upload(picture) {
  const answer = await send("v1/images", { method: "POST", body: form({ image: picture }) });
  return (await answer.json()).id;
}

/** What the server keeps, as a file. @param {string} id @param {"png" | "input"} format */
export const file = async (id, format) => (await send(`v1/images/${id}?format=${format}`)).blob();

/**
 * @param {Record<string, unknown>} fields @param {AbortSignal} [signal]
 * @returns {Promise<{masks?: string[], scores?: number[], boxes?: ([number, number, number, number] | null)[],
 *   mask: string, box: [number, number, number, number] | null}>}
 */
export async function segment(fields, signal) {
  const accept = { accept: "application/json" };
  return (await send("v1/segment", { method: "POST", body: form(fields), headers: accept, signal })).json();
}

/**
 * An edit, and how far it is.
 * @param {"erase" | "replace"} kind @param {Record<string, unknown>} fields @param {Watch} watch
 * @returns {Promise<Record<string, any>>} the reply's fields
 */
export async function edit(kind, fields, { onJob, onProgress, signal }) {
  const headers = { accept: "text/event-stream" };
  const answer = await send(`v1/${kind}`, { method: "POST", body: form(fields), headers, signal });
  let last = null;
  try {
    for await (const { name, data } of events(/** @type {ReadableStream<Uint8Array>} */ (answer.body))) {
      if (name === "job") onJob?.(data.job);
      else if (name === "progress") onProgress?.(data);
      else last = { name, data };
    }
  } catch (error) {
    if (signal?.aborted) throw error;
  }
  if (!last) throw new Unreachable("the server went away amid the work");
  if (last.name !== "done") throw new ServerError(last.data.error.code, last.data.error.message, last.data.error.field);
  return last.data;
}

/** @param {string} job */
export const cancel = (job) => send(`v1/jobs/${job}`, { method: "DELETE" });

/** @returns {Promise<{models: ModelStatus[], memory: {device: string}}>} */
export const models = async () => (await send("v1/models")).json();

export const ping = () => send("ping");

/**
 * Server-sent events of a reply; comments are left out.
 * @param {ReadableStream<Uint8Array>} body @returns {AsyncGenerator<{name: string, data: any}>}
 */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  /** @type {string[]} */
  let pieces = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const text = decoder.decode(value, { stream: true });
    pieces.push(text);
    if (!text.includes("\n")) continue; // of a large event: its end is looked for once
    const blocks = pieces.join("").split("\n\n");
    pieces = [/** @type {string} */ (blocks.pop())];
    for (const block of blocks) {
      const event = /^event: (.*)\ndata: ([^]*)$/.exec(block);
      if (event) yield { name: event[1], data: JSON.parse(event[2]) };
    }
  }
}

/** @param {string} base64 @param {string} type */
export async function blobOf(base64, type) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type });
}
