// A name that nobody else has. (crypto.randomUUID is there for https and this machine alone.)
export const randomName = () => [...crypto.getRandomValues(new Uint32Array(4))].map((each) => each.toString(36)).join("-");
