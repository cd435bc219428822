// What js-libp2p takes from newer releases of Node.js than 20. Loaded before it, by --import.

Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((...both) => { [resolve, reject] = both })
  return { promise, resolve, reject }
}
