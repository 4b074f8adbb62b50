// Looks after the server: which models are where, how many wait, and whether it is there at all.
import { effect } from "@preact/signals-core";
import * as api from "./api.js";
import * as state from "./state.js";

const EVERY = 5_000; // milliseconds, while the page is seen
const WHILE_WAITING = 1_000;
const LONGEST = 15_000; // between two attempts to reach a server that is gone

/** @param {() => void} onBack  called when a server that was gone answers again */
export function watch(onBack) {
  let timer = 0;
  let failures = 0;
  const look = async () => {
    clearTimeout(timer);
    if (document.visibilityState === "visible") {
      try {
        if (!state.reachable.value) await api.ping();
        const { models, memory } = await api.models();
        state.models.value = models;
        state.device.value = memory.device;
        tellPlace(models);
        failures = 0;
        state.loggedOut.value = false;
        if (!state.reachable.value) {
          state.reachable.value = true;
          state.notice.value = { what: "done", text: "The server is back. Everything is as you left it." };
          onBack();
        }
      } catch (error) {
        // One that answers in error is starting: it is asked again.
        if (error instanceof api.Unreachable) state.reachable.value = false;
        if (error instanceof api.LoggedOut) state.loggedOut.value = true;
        failures += 1;
      }
    }
    const pause = failures ? Math.min(LONGEST, 500 * 2 ** failures) : state.job.value?.phase === "queued" ? WHILE_WAITING : EVERY;
    clearTimeout(timer);
    timer = setTimeout(look, pause);
  };
  document.addEventListener("visibilitychange", look);
  addEventListener("online", look);
  let waiting = false;
  effect(() => {
    const now = state.job.value?.phase === "queued" || !state.reachable.value;
    if (now && !waiting) setTimeout(look, 250);
    waiting = now;
  });
  look();
}

/** How many requests wait for the model that a job waits for, too. @param {import("./api.js").ModelStatus[]} models */
function tellPlace(models) {
  const job = state.job.value;
  if (job?.phase !== "queued") return;
  const queue = models.find(({ name }) => name === job.model)?.queue ?? 0;
  state.job.value = { ...job, ahead: Math.max(0, queue - 1) };
}
