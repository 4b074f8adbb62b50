// Logging in and out. The cookie that stands for the key no script can read, so whether there is one is noted beside it.

const MARK = "logged-in";

/** @param {string} key @returns {Promise<number>} the status of the server's answer; throws where there is none */
export async function logIn(key) {
  const body = JSON.stringify({ key });
  const answer = await fetch("login", { method: "POST", headers: { "content-type": "application/json" }, body });
  if (answer.ok) noted((notes) => notes.setItem(MARK, "yes"));
  return answer.status;
}

/** Throws where the server does not answer. */
export async function logOut() {
  await fetch("logout", { method: "POST" });
  noted((notes) => notes.removeItem(MARK));
}

export const isLoggedIn = () => noted((notes) => notes.getItem(MARK)) === "yes";

/** @template T @param {(notes: Storage) => T} use @returns {T | null} null in a browser that keeps nothing */
function noted(use) {
  try {
    return use(localStorage);
  } catch {
    return null;
  }
}
