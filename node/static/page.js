// The live page: draws every status that /events brings. Text from other peers only ever becomes text nodes.

const PHASES = ["gather", "exchange", "commit", "fetch", "apply"];
const DOING = {
  prepare: "asking the voters what an earlier attempt may have decided",
  gather: "training until the peers are ready",
  exchange: "exchanging and reducing parts",
  commit: "collecting votes",
  fetch: "fetching bytes of the certified update",
  apply: "applying the outer step",
};
const FAILED = {
  attempt_failed: "failed attempt",
  part_reassigned: "part moved",
  sender_missing: "part left out",
};
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 8, right: 12, bottom: 24, left: 44 };

const at = (id) => document.getElementById(id);
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en");
let seenAt = null;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function formatBytes(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (bytes >= 999.5 && unit < units.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${unit === 0 || bytes >= 99.95 ? Math.round(bytes) : bytes.toFixed(1)} ${units[unit]}`;
}

function formatSpan(seconds) {
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

const count = (number, one) => `${whole.format(number)} ${one}${number === 1 ? "" : "s"}`;
const formatLoss = (loss) => (loss === null ? "–" : loss.toFixed(loss < 10 ? 3 : 1));
const formatRate = (mbit) => (mbit === null ? "–" : mbit.toFixed(mbit < 99.95 ? 1 : 0));
const formatCap = (mbit) => (mbit === null ? "none" : `${mbit} Mbit/s`);
const formatTime = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
const shortId = (peer) => peer.slice(-8);
const nameOf = (row) => row.name || shortId(row.peer);

function showHeader(status) {
  document.title = `round ${status.round.round} · ${status.swarm_name}`;
  at("swarm").textContent = status.swarm_name;
  const words = [status.name, `…${shortId(status.peer)}`, status.role, `up ${formatSpan(status.uptime_s)}`];
  at("peer").textContent = words.filter(Boolean).join(" · ");
  at("peer").title = status.peer;
  at("root").textContent = status.round.state_root.slice(0, 16) || "–";
  at("root").title = status.round.state_root;
  at("version").textContent = `shoal ${status.version}`;
  at("join").textContent = `shoal join '${status.uri}'`;
}

function showVerdict(verdict, warnings) {
  const state = at("state");
  const bad = verdict.healthy.length > 0;
  state.className = `pill ${bad ? "bad" : verdict.ready.length ? "warning" : "good"}`;
  state.textContent = bad ? "unhealthy" : verdict.ready.length ? "not ready" : "ready";
  const lines = [
    ...verdict.healthy.map((text) => ["bad", text]),
    ...verdict.ready.filter((text) => !verdict.healthy.includes(text)).map((text) => ["warning", text]),
    ...warnings.map((text) => ["warning", text]),
  ];
  at("notices").replaceChildren(...lines.map(([kind, text]) => make("li", kind, text[0].toUpperCase() + text.slice(1))));
  at("notices").hidden = lines.length === 0;
}

function showRound(status) {
  const { round, training, catch_up: catchUp } = status;
  at("round").textContent = `Round ${whole.format(round.round)}`;
  at("attempt").hidden = round.attempt === 0;
  at("attempt").textContent = `attempt ${round.attempt + 1}`;
  const limit = round.deadline === null ? "" : ` (${round.deadline})`;
  const left = round.deadline_s === null ? "" : `, at most ${formatSpan(Math.max(0, round.deadline_s))} left${limit}`;
  at("deadline").textContent = `for ${formatSpan(round.phase_s)}${left}`;
  const shown = PHASES.includes(round.phase) ? PHASES : [round.phase, ...PHASES];
  const current = shown.indexOf(round.phase);
  at("phases").replaceChildren(
    ...shown.map((phase, index) => {
      const item = make("li", index < current ? "past" : index === current ? "now" : "", phase);
      if (index === current) item.setAttribute("aria-current", "step");
      return item;
    }),
  );
  at("progress").style.width = `${100 * (round.progress ?? 0)}%`;
  const waiting = round.waiting_for.map(nameOf);
  const names = waiting.length > 6 ? `${waiting.slice(0, 6).join(", ")} and ${waiting.length - 6} more` : waiting.join(", ");
  const doing = catchUp.active ? `catching up: ${catchUp.detail}` : DOING[round.phase] ?? round.phase;
  const steps = round.phase === "gather" && training.steps_planned ? `, step ${training.steps} of ${training.steps_planned}` : "";
  at("waiting").textContent = doing + steps + (names ? ` · waiting for ${names}` : "");
}

function showFailures(failures) {
  const lines = failures.map((one) => {
    const who = one.peer ? ` (${one.peer})` : "";
    const where = `attempt ${one.attempt + 1} of round ${whole.format(one.round)}`;
    const line = make("li", "", `${FAILED[one.kind] ?? one.kind}: `);
    line.append(make("code", "", one.reason), `${who} in ${where}, ${formatSpan(one.age_s)} ago; ${one.remedy}`);
    return line;
  });
  at("failures").replaceChildren(...lines);
  at("failures").hidden = lines.length === 0;
}

function describeCaps(line) {
  const until = line.caps_until === null ? "" : `, until ${line.caps_until}`;
  const relay = line.relay_withheld ? "; a capped peer relays no tensors for others" : "";
  return `upload cap ${formatCap(line.upload_cap_mbit)}, download cap ${formatCap(line.download_cap_mbit)}${until}${relay}`;
}

const formatPerplexity = (perplexity) => (perplexity === null ? "–" : perplexity.toPrecision(4));

function describeHeldOut(found, unit) {
  const who = found.name ? `, measured by ${found.name}` : "";
  const perplexity = found.perplexity === null ? "" : `, perplexity ${formatPerplexity(found.perplexity)}`;
  return `${unit ? `${unit}, ` : ""}round ${whole.format(found.round)}${perplexity}${who}`;
}

function tileHeldOut(status) {
  // The own one is the newer one while this peer may not write into the ledger.
  const [swarms, own] = [status.measured[0] ?? null, status.training.held_out];
  const found = own === null || (swarms !== null && swarms.round >= own.round) ? swarms : own;
  const detail = found ? describeHeldOut(found, status.training.loss_unit) : "not measured yet";
  return ["Held-out loss", formatLoss(found?.loss ?? null), detail];
}

function showTiles(status) {
  const { training, traffic, line, round, disk, reach } = status;
  const open = reach.addresses.filter((one) => one.state === "reachable").map((one) => one.address);
  const alive = status.peers.filter((peer) => peer.alive).length;
  const part = status.peers.filter((peer) => peer.participating).length;
  const aborted = status.aborted.reduce((sum, one) => sum + one.count, 0);
  const worst = [...status.aborted].sort((one, other) => other.count - one.count)[0];
  const saved = traffic.fp32_bytes - traffic.contribution_bytes;
  const ratio = traffic.contribution_bytes ? (traffic.fp32_bytes / traffic.contribution_bytes).toFixed(1) : null;
  const sent = traffic.tensor_sent_bytes + traffic.control_sent_bytes;
  const received = traffic.tensor_received_bytes + traffic.control_received_bytes;
  const restarts = training.restarts ? `, ${count(training.restarts, "restart")}` : "";
  const pairs = training.pairs_mixed ? `, mixed in ${count(training.pairs_mixed, "pair")} without a quorum` : "";
  const tiles = [
    ["Loss", formatLoss(training.loss_last), training.loss_first === null ? "" : `began at ${formatLoss(training.loss_first)}`],
    tileHeldOut(status),
    ["Tokens per second", compact.format(training.tokens_per_s ?? 0), `${compact.format(training.tokens)} trained here`],
    ["Peers", `${alive}`, `${part} in this round, ${round.voters_live} of ${round.voters} voters live`],
    ["Saved against fp32", formatBytes(Math.max(0, saved)), ratio ? `contributions ${ratio} times smaller` : "no contribution yet"],
    ["Rounds certified", whole.format(status.rounds_certified), aborted ? `${count(aborted, "attempt")} aborted, most: ${worst.reason}` : "no attempt aborted"],
    ["Sent", formatBytes(sent), `${formatBytes(received)} received`],
    ["Tensors, Mbit/s", `${formatRate(line.sent_mbit)} up, ${formatRate(line.received_mbit)} down`, describeCaps(line)],
    ["Reachable", reach.state, open.length ? open.join(", ") : reach.reason],
    ["Router", status.router.state.replace("_", " "), status.router.reason || status.router.addresses.join(", ")],
    ["Trainer", training.state, `${training.device || "no device"}${restarts}${pairs}`],
    ["On disk", formatBytes(disk.blob_bytes), `${formatBytes(disk.free_bytes)} free, rounds from ${disk.oldest_round} on, snapshot of ${disk.snapshot_round}`],
  ];
  at("tiles").replaceChildren(
    ...tiles.map(([title, figure, note]) => {
      const tile = make("dl", "tile");
      tile.append(make("dt", "", title), make("dd", "", figure), make("dd", "note", note));
      return tile;
    }),
  );
}

function showPeers(peers) {
  const rows = peers.map((peer) => {
    const row = make("tr", peer.alive ? "" : "gone");
    const who = make("td");
    who.append(make("bdi", "", nameOf(peer)));
    who.title = peer.peer;
    if (peer.name) who.append(make("span", "id short", shortId(peer.peer)));
    if (peer.me) who.append(make("span", "id", "(this)"));
    const state = make("td");
    const tags = peer.alive
      ? [peer.participating && ["in the round", ""], !peer.participating && peer.ready && ["ready", "good"], peer.voter && ["votes", "plain"], peer.owner && ["owns parts", "plain"]]
      : [["gone", "bad"]];
    const shown = tags.filter(Boolean);
    state.append(...(shown.length ? shown : [["trains on", "plain"]]).map(([text, kind]) => make("span", `tag ${kind}`, text)));
    row.append(
      who,
      state,
      make("td", "number", peer.alive ? compact.format(peer.tokens_per_s ?? 0) : "–"),
      make("td", "number", whole.format(peer.head_round)),
      make("td", "wide", peer.agent),
      make("td", "wide", [peer.address, peer.path].filter(Boolean).join(" ")),
    );
    return row;
  });
  at("peers").replaceChildren(...rows);
}

function showMeasured(measured) {
  const rows = measured.map((one) => {
    const row = make("tr");
    const who = make("td");
    who.append(make("bdi", "", nameOf(one)));
    who.title = one.peer;
    row.append(
      who,
      make("td", "number", whole.format(one.round)),
      make("td", "number", formatLoss(one.loss)),
      make("td", "number", formatPerplexity(one.perplexity)),
      make("td", "number wide", whole.format(one.tokens)),
    );
    return row;
  });
  at("measured").replaceChildren(...rows);
  at("unmeasured").hidden = rows.length > 0;
}

function showHappenings(happenings) {
  const items = [...happenings].reverse().map((one) => {
    const item = make("li", one.severity);
    item.append(make("time", "", formatTime(one.at_s)), make("span", "text", one.text));
    return item;
  });
  at("happenings").replaceChildren(...(items.length ? items : [make("li", "", "nothing yet")]));
}

function tickStep(range, count) {
  const rough = range / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
}

function ticksBetween(low, high, count) {
  const step = tickStep(high - low, count);
  const ticks = [];
  for (let index = Math.ceil(low / step); index * step <= high + step * 1e-6; index += 1) ticks.push(index * step);
  return ticks;
}

function showLoss(history) {
  const box = at("loss");
  const points = history.filter((point) => point.loss !== null);
  if (points.length < 2) {
    box.replaceChildren(make("p", "empty", "The curve begins with the second round."));
    at("loss-range").textContent = "";
    return;
  }
  at("loss-range").textContent = `${formatLoss(points[0].loss)} → ${formatLoss(points.at(-1).loss)}`;
  const width = box.clientWidth;
  const height = box.clientHeight;
  const losses = points.map((point) => point.loss);
  const spread = Math.max(...losses) - Math.min(...losses) || Math.abs(losses[0]) || 1;
  const low = Math.min(...losses) - 0.06 * spread;
  const high = Math.max(...losses) + 0.06 * spread;
  const [first, last] = [points[0].round, points.at(-1).round];
  const x = (round) => MARGIN.left + ((round - first) / (last - first)) * (width - MARGIN.left - MARGIN.right);
  const y = (loss) => height - MARGIN.bottom - ((loss - low) / (high - low)) * (height - MARGIN.top - MARGIN.bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(draw("title", {}, `Loss from ${formatLoss(losses[0])} to ${formatLoss(losses.at(-1))} over rounds ${first} to ${last}`));
  const step = tickStep(high - low, 4);
  const digits = Math.max(0, -Math.floor(Math.log10(step)) + (step.toPrecision(1) * 1 === step ? 0 : 1));
  for (const tick of ticksBetween(low, high, 4)) {
    svg.append(draw("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }));
    svg.append(draw("text", { x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(digits)));
  }
  for (const tick of ticksBetween(first, last, Math.min(8, width / 80)).filter(Number.isInteger)) {
    svg.append(draw("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, whole.format(tick)));
  }
  const line = points.map((point) => `${x(point.round).toFixed(1)},${y(point.loss).toFixed(1)}`).join(" ");
  const floor = height - MARGIN.bottom;
  svg.append(draw("polygon", { class: "area", points: `${x(first)},${floor} ${line} ${x(last)},${floor}` }));
  svg.append(draw("polyline", { class: "curve", points: line }));
  svg.append(draw("circle", { class: "dot", cx: x(last), cy: y(losses.at(-1)), r: 4 }));
  box.replaceChildren(svg);
  addCursor(box, svg, points, x, y, floor);
}

function addCursor(box, svg, points, x, y, floor) {
  const cursor = draw("line", { class: "cursor", y1: MARGIN.top, y2: floor, visibility: "hidden" });
  const dot = draw("circle", { class: "dot", r: 4, visibility: "hidden" });
  const tip = make("p", "tip");
  tip.hidden = true;
  svg.append(cursor, dot);
  box.append(tip);
  const show = (visible) => {
    for (const mark of [cursor, dot]) mark.setAttribute("visibility", visible ? "visible" : "hidden");
    tip.hidden = !visible;
  };
  svg.addEventListener("pointerleave", () => show(false));
  svg.addEventListener("pointermove", (event) => {
    const pointer = event.clientX - svg.getBoundingClientRect().left;
    const distance = (point) => Math.abs(x(point.round) - pointer);
    const nearest = points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
    const left = x(nearest.round);
    for (const [mark, name] of [[cursor, "x1"], [cursor, "x2"], [dot, "cx"]]) mark.setAttribute(name, left);
    dot.setAttribute("cy", y(nearest.loss));
    tip.textContent = `round ${whole.format(nearest.round)}: ${formatLoss(nearest.loss)}`;
    show(true);
    const widest = box.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(widest, left - tip.offsetWidth / 2))}px`;
  });
}

let latest = null;
let drawnHistory = "";

function showStatus(status) {
  latest = status;
  seenAt = new Date();
  showHeader(status);
  showRound(status);
  showFailures(status.failures);
  showTiles(status);
  showPeers(status.peers);
  showMeasured(status.measured);
  showHappenings(status.happenings);
  // The curve is drawn anew only when it changed, so that its cursor stays under the pointer.
  const history = JSON.stringify(status.training.loss_history);
  if (history !== drawnHistory) showLoss(status.training.loss_history);
  drawnHistory = history;
}

const events = new EventSource("/events");
events.addEventListener("status", (event) => showStatus(JSON.parse(event.data)));
events.addEventListener("verdict", (event) => showVerdict(JSON.parse(event.data), latest.warnings));
events.addEventListener("error", () => {
  at("state").className = "pill bad";
  at("state").textContent = "no answer";
  const since = seenAt ? ` What you see is from ${formatTime(seenAt / 1000)}.` : "";
  at("notices").replaceChildren(make("li", "bad", `The daemon does not answer; trying again.${since}`));
  at("notices").hidden = false;
  // A stream that was refused is not opened again by the browser itself.
  if (events.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 5000);
});
new ResizeObserver(() => latest && showLoss(latest.training.loss_history)).observe(at("loss"));
at("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(at("join").textContent);
  at("copy").textContent = "Copied";
  setTimeout(() => (at("copy").textContent = "Copy"), 1500);
});
