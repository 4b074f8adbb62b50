// What was done, as a list of states with a place in it. Pure: every function returns a new history.

/**
 * @template {{bytes: number}} State  bytes: what the state alone keeps in memory
 * @typedef {{states: readonly State[], index: number}} History  index: of the state that is shown; -1 where there is none
 */

export const MOST_STATES = 200;
export const MOST_BYTES = 256 * 2 ** 20;

/** @returns {History<any>} */
export const empty = () => ({ states: [], index: -1 });

/**
 * The state after the one that is shown; what had been undone is gone. Past the bounds the oldest go.
 * @template {{bytes: number}} State
 * @param {History<State>} history @param {State} state @returns {History<State>}
 */
export function push(history, state, mostStates = MOST_STATES, mostBytes = MOST_BYTES) {
  let states = [...history.states.slice(0, history.index + 1), state];
  let bytes = states.reduce((sum, each) => sum + each.bytes, 0);
  while (states.length > 1 && (states.length > mostStates || bytes > mostBytes)) {
    bytes -= states[0].bytes;
    states = states.slice(1);
  }
  return { states, index: states.length - 1 };
}

/**
 * @template {{bytes: number}} State
 * @param {History<State>} history @param {number} index @returns {History<State>}
 */
export function go(history, index) {
  const last = history.states.length - 1;
  return { states: history.states, index: Math.max(Math.min(index, last), Math.min(0, last)) };
}

/**
 * With one state in the place of another.
 * @template {{bytes: number}} State @param {History<State>} history @param {State} old @param {State} other @returns {History<State>}
 */
export const replaced = (history, old, other) => ({ ...history, states: history.states.map((each) => (each === old ? other : each)) });

/** @template {{bytes: number}} State @param {History<State>} history */
export const undo = (history) => go(history, history.index - 1);

/** @template {{bytes: number}} State @param {History<State>} history */
export const redo = (history) => go(history, history.index + 1);

/** @param {History<any>} history */
export const canUndo = (history) => history.index > 0;

/** @param {History<any>} history */
export const canRedo = (history) => history.index < history.states.length - 1;

/** @template {{bytes: number}} State @param {History<State>} history @returns {State | undefined} */
export const current = (history) => history.states[history.index];
