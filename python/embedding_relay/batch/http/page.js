"use strict";

const FAILURES_PER_PAGE = 50;
const ANSWERS_PER_PAGE = 20;
const FIRST_ROWS = 5;
const MOST_COLUMNS_SHOWN = 300;
// A stream that is silent for so long may be dead without saying so; the state is asked for once, and it is opened anew.
const QUIET_MS = 15000;

// A run changes its answers all the time; those that are looked at are renewed so often.
const RENEW_MS = 3000;
const ENDPOINT_MS = 15000;
const AWAY_MS = 4000;

/** What belongs to the session that is shown, and to no other. */
const untouched = () => ({ session: null, analysis: "", baseline: "", previewed: "", failuresSkip: 0, failuresShown: "", failuresAt: 0, answersSkip: 0, answersShown: "", answersAt: 0 });
const state = { id: "", turn: 0, saidLast: "", endpoint: null, awaySince: 0, ...untouched() };
const $ = (id) => document.getElementById(id);
// Everything shown goes in as text: names of files, cells and errors are other people's.
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const setText = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const number = (value) => new Intl.NumberFormat("en").format(value);
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const atTime = (seconds) => {
  const moment = new Date(seconds * 1000);
  return moment.toDateString() === new Date().toDateString() ? moment.toLocaleTimeString() : when(seconds);
};
const when = (seconds) => new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

function duration(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// ---- calls

class Refused extends Error {
  constructor(status, detail) { super(detail); this.status = status; }
}

const savedKey = () => sessionStorage.getItem("api-key");
const withKey = (headers = {}) => savedKey() ? { ...headers, Authorization: `Bearer ${savedKey()}` } : headers;

async function call(method, path, body, signal) {
  for (;;) {
    const usedKey = savedKey();
    const headers = withKey(body ? { "Content-Type": "application/json" } : {});
    const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), cache: "no-store", signal });
    if (answer.ok) return answer;
    if (answer.status !== 401) throw new Refused(answer.status, await reasonIn(answer));
    await askForKey(usedKey);
  }
}
const get = async (path) => (await call("GET", path)).json();
const post = async (path, body) => (await call("POST", path, body)).json();

async function reasonIn(answer) {
  try {
    return (await answer.json()).detail;
  } catch {
    return `the service answered with status ${answer.status}`;
  }
}

let keyAsked = null;
function askForKey(usedKey) {
  if (savedKey() !== usedKey) return Promise.resolve();  // another call has asked meanwhile
  setText($("key-error"), usedKey ? "The service did not accept this key." : "");
  keyAsked ??= new Promise((resolve) => {
    $("key").value = "";
    $("key-dialog").showModal();
    $("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem("api-key", $("key").value.trim());
      $("key-dialog").close();
      keyAsked = null;
      resolve();
    }, { once: true });
  });
  return keyAsked;
}
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());  // nothing can be shown without the key

/** fetch() cannot tell how much of a file has been sent. */
function send(file, onProgress) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("file", file);
    const request = new XMLHttpRequest();
    request.open("POST", "api/analyze/upload");
    for (const [name, value] of Object.entries(withKey())) request.setRequestHeader(name, value);
    request.responseType = "json";
    request.upload.addEventListener("progress", (event) => onProgress(100 * event.loaded / event.total));
    request.addEventListener("load", () => request.status === 200 ? resolve(request.response)
      : reject(new Refused(request.status, request.response?.detail ?? `the service answered with status ${request.status}`)));
    request.addEventListener("error", () => reject(new Error(
      "The upload broke off: the service is away, or the file is larger than it takes. Please try again.")));
    request.send(form);
  });
}

// ---- upload

async function upload(file) {
  if (!$("uploading").hidden) return;  // one at a time
  location.hash = "";
  setText($("upload-error"), "");
  $("uploading").hidden = false;
  $("file").disabled = true;
  try {
    const session = await uploaded(file);
    refreshAll();
    location.hash = session.session_id;
  } catch (error) {
    setText($("upload-error"), `${file.name}: ${error.message}`);
  } finally {
    $("uploading").hidden = true;
    $("file").disabled = false;
    $("file").value = "";
  }
}

async function uploaded(file) {
  for (;;) {
    const usedKey = savedKey();
    try {
      return await send(file, (percent) => {
        $("upload-bar").value = percent;
        setText($("upload-text"), percent < 100 ? `Uploading ${file.name}: ${Math.floor(percent)} %` : `Analysing ${file.name}…`);
      });
    } catch (error) {
      if (error.status !== 401) throw error;
      await askForKey(usedKey);
    }
  }
}

$("file").addEventListener("change", () => { if ($("file").files.length) upload($("file").files[0]); });
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
});

// ---- following one session

let wake = () => {};
const pause = (milliseconds) => new Promise((resolve) => { wake = resolve; setTimeout(resolve, milliseconds); });
// From the moment its tasks were handed to the workers, whether one has taken the run yet or not.
const isRunning = (session) => session.stage === "executing";

function delay(session) {
  const split = session.split.status;
  const moving = split === "processing" || split === "saving" || isRunning(session);
  return moving ? 400 : 3000;
}

async function follow(id) {
  const turn = ++state.turn;
  let misses = 0;
  while (turn === state.turn) {
    try {
      const session = await get(`api/sessions/${id}`);
      if (turn !== state.turn) return;
      misses = 0;
      inTouch();
      show(session);
      if (isRunning(session)) await watchLive(id, turn).catch(() => {});  // the next question tells what is wrong
      if (turn !== state.turn) return;
      await pause(delay(state.session));
    } catch (error) {
      if (turn !== state.turn) return;
      if (error.status === 404) return gone(error.message);
      outOfTouch(error);
      await pause(Math.min(1000 * 2 ** misses++, 8000));
    }
  }
}

async function watchLive(id, turn) {
  const stop = new AbortController();
  let quiet = 0;
  try {
    const answer = await call("GET", `api/execute/stream/${id}`, undefined, stop.signal);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      quiet = setTimeout(() => stop.abort(), QUIET_MS);
      const { value, done } = await reader.read();
      clearTimeout(quiet);
      if (done || turn !== state.turn) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) takeLive(event);
    }
  } finally {
    clearTimeout(quiet);
    stop.abort();
  }
}

function takeLive(event) {
  if (!event.startsWith("data: ")) return;  // it is gone; the next question says so
  const { stage, session_id, ...execution } = JSON.parse(event.slice(6));
  show({ ...state.session, stage, execution });
}

function inTouch() {
  $("trouble").hidden = true;
  document.body.classList.remove("stale");
}
function outOfTouch(error) {
  const reason = error.status ? error.message : "it does not answer";
  setText($("trouble"), `The service cannot be reached just now: ${reason}. Trying again; what you see is the last that is known.`);
  $("trouble").hidden = false;
  document.body.classList.add("stale");
}

function gone(reason) {
  state.session = null;
  setText($("session-error"), `Nothing is left of this session: ${reason}.`);
  document.querySelector(".steps").hidden = true;
  $("session-pill").hidden = $("delete").hidden = true;
  refreshAll();
}

// ---- showing one session

function show(session) {
  state.session = session;
  document.querySelector(".steps").hidden = false;
  setText($("session-name"), session.name);
  showState($("session-pill"), session);
  setText($("session-about"), `Uploaded ${when(session.created_at)} · session ${session.session_id}`);
  showWorkbook(session);
  showRun(session);
  showAnswers(session);
  showSteps(session);
  setText(document.querySelector("title"), `${summary(session)} · ${session.name}`);
  announce(session);
  const item = itemOf(session.session_id);
  if (item) describe(item, session);
}

function summary({ stage, split, execution }) {
  if (stage === "failed") return "failed";
  if (stage === "completed") return execution.cancelled ? "cancelled" : execution.failed ? `completed, ${number(execution.failed)} failed` : "completed";
  if (stage === "executing") return execution.saving ? "saving" : `${execution.paused ? "paused, " : execution.waiting ? "waiting, " : ""}${Math.floor(execution.progress)} %`;
  if (stage === "split_complete") return "ready to start";
  return split.status === "not_started" ? "analysed" : `reading the rows, ${Math.floor(split.progress)} %`;
}

/** It waits for other runs of this service, and not for the endpoint. */
const isQueued = ({ trouble }) => trouble === "its turn";

function tone({ stage, split, execution }) {
  if (stage === "failed") return "bad";
  if (stage === "completed") return execution.cancelled ? "" : execution.failed ? "warn" : "good";
  if (stage === "executing") return execution.paused || isQueued(execution) ? "warn" : execution.waiting ? "bad" : "now";
  return split.status === "not_started" ? "" : "now";
}

function showState(pill, session) {
  pill.hidden = false;
  setText(pill, summary(session));
  pill.dataset.tone = tone(session);
}

/** For ears: a change of what goes on, and every tenth of the way, not each number. */
function announce(session) {
  const part = session.stage === "executing" ? session.execution : session.split;
  const key = [session.session_id, session.stage, session.split.status, session.execution.saving, Math.floor(part.progress / 10)].join();
  if (key === state.saidLast) return;
  state.saidLast = key;
  setText($("announcer"), `${session.name}: ${summary(session)}`);
}

const isBegun = ({ split, execution }) => execution.status !== "idle" || split.status === "processing" || split.status === "saving";

function showSteps(session) {
  const now = session.execution.ready_for_download ? "download" : isBegun(session) || session.split.ready_for_next_stage ? "run" : "workbook";
  const order = ["workbook", "run", "download"];
  order.forEach((name, index) => {
    const step = $(`step-${name}`);
    const done = index < order.indexOf(now);
    step.ariaCurrent = name === now ? "step" : null;
    step.dataset.state = done ? "done" : name === now || (name === "run" && now === "workbook") ? "now" : "later";
    setText(step.querySelector(".mark"), done ? "✓" : `${index + 1}`);
  });
}

function showWorkbook(session) {
  const { analysis, choices, split } = session;
  const open = split.status === "not_started";
  $("choices").disabled = !open;
  setText($("choices-title"), open ? "Change the columns or the prompt" : "The columns");
  const key = JSON.stringify([session.session_id, analysis, choices, open, split.ready_for_next_stage]);
  if (key === state.analysis) return;  // what somebody is choosing stays as it is
  state.analysis = key;
  $("choices-part").hidden = $("preview-part").hidden = !analysis;
  $("choices-part").hidden ||= analysis.requests;
  $("choices-part").open = open && Boolean(analysis) && !analysis.prompt_column && !choices.template;
  $("preview-part").open = open;
  $("notes").replaceChildren(...(analysis?.notes ?? []).map((note) => make("li", { textContent: note })));
  setText($("found"), analysis ? described(analysis) : "This file could not be used.");
  if (!analysis) return;
  fillChoices(analysis, choices);
  loadPreview();
}

function described({ rows, pictures, sheets, sheet, requests }) {
  if (requests) return `${plural(rows, "line")}, each a whole request.`;
  const where = sheets.length > 1 ? ` in sheet ${sheet}` : "";
  return `${plural(rows, "row")}${where}${pictures ? `, ${plural(pictures, "picture")} in its cells` : ""}.`;
}

function fillChoices(analysis, choices) {
  $("sheet-part").hidden = analysis.sheets.length < 2;
  $("sheet").replaceChildren(...analysis.sheets.map(({ name, rows }) =>
    make("option", { value: name, textContent: `${name} (${plural(rows, "row")})`, selected: name === analysis.sheet })));
  $("columns").replaceChildren(...analysis.columns.slice(0, MOST_COLUMNS_SHOWN).map((column) => columnItem(column, analysis)));
  $("chips").replaceChildren(...analysis.columns.slice(0, MOST_COLUMNS_SHOWN).map(({ name }) => chip(name)));
  $("template").value = choices.template;
  $("template-part").open = Boolean(choices.template) || !analysis.prompt_column;
  state.baseline = JSON.stringify(chosen());
}

function columnItem(column, analysis) {
  const role = column.name === analysis.prompt_column ? "prompt" : analysis.image_columns.includes(column.name) ? "image" : "";
  const roles = [["", "not used"], ["prompt", "the prompt"], ["image", "pictures"]];
  const select = make("select", {}, ...roles.map(([value, textContent]) => make("option", { value, textContent, selected: value === role })));
  select.dataset.column = column.name;
  select.addEventListener("change", () => { if (select.value === "prompt") onlyPrompt(select); });
  const name = column.letter === column.name ? column.name : `${column.letter}  ${column.name}`;
  return make("li", {},
    make("div", {}, make("strong", { textContent: name }),
      make("span", { className: "quiet small", textContent: ` · ${plural(column.filled, "row")} filled` }),
      make("span", { className: "samples", textContent: column.samples.join(" · ") })),
    make("label", {}, make("span", { className: "unseen", textContent: `Use of column ${column.name}` }), select));
}

function onlyPrompt(chosenSelect) {
  for (const select of $("columns").querySelectorAll("select")) {
    if (select !== chosenSelect && select.value === "prompt") select.value = "";
  }
}

function chip(name) {
  const button = make("button", { type: "button", className: "chip", textContent: `{${name}}` });
  button.addEventListener("click", () => {
    const field = $("template");
    field.setRangeText(button.textContent, field.selectionStart, field.selectionEnd, "end");
    field.focus();
  });
  return button;
}

function chosen() {
  const named = (role) => [...$("columns").querySelectorAll("select")].filter((select) => select.value === role).map((select) => select.dataset.column);
  const template = $("template").value.trim();
  return { sheet: $("sheet").value, prompt_column: template ? "" : named("prompt")[0] ?? "", image_columns: named("image"), template };
}

// ---- before it is asked

/** The choices as they are on the page; nothing, where they are those of the session. */
function changedChoices() {
  const choices = chosen();
  return JSON.stringify(choices) === state.baseline ? {} : choices;
}

let previewTimer = 0;
function previewSoon(event) {
  if (event.target.id === "sheet") return;  // another sheet has other columns: the workbook is analysed again
  $("trial").hidden = true;
  clearTimeout(previewTimer);
  previewTimer = setTimeout(loadPreview, 300);
}
$("choices").addEventListener("input", previewSoon);

async function loadPreview() {
  if (!state.session) return;
  const { session_id, split } = state.session;
  const body = split.status === "not_started" ? changedChoices() : {};
  const key = JSON.stringify([session_id, body, state.analysis]);
  if (key === state.previewed) return;
  state.previewed = key;
  try {
    const found = await post("api/analyze/preview", { session_id, rows: FIRST_ROWS, ...body });
    if (state.previewed === key) fillPreview(found);
  } catch (error) {
    if (state.previewed !== key) return;
    state.previewed = "";
    if (error.status && error.status !== 404) {
      fillPreview({ why: [], rows: [] });
      setText($("preview-error"), error.message);
      $("preview-part").open = true;
    }
  }
}

function fillPreview({ why, rows }) {
  setText($("preview-error"), "");
  const titles = { sheet: "Sheet", prompt: "Prompt", pictures: "Pictures" };
  $("why").replaceChildren(...why.flatMap(({ what, name, reason }) => [
    make("dt", { textContent: titles[what] ?? what }),
    make("dd", {}, make("strong", { textContent: name }), make("span", { className: "quiet", textContent: ` · ${reason}` }))]));
  $("preview").hidden = !rows.length;
  $("preview-rows").replaceChildren(...rows.map((row) => make("tr", {},
    make("td", { textContent: number(row.row) }), cell("", asked(row, row.error ? `Cannot be asked: ${row.error}` : row.prompt)))));
}

function cell(label, ...children) {
  const element = make("td", {}, ...children);
  if (label) element.dataset.label = label;
  return element;
}
const textOf = (text, isBad) => make("p", { className: isBad ? "text is-bad" : "text", textContent: text });

const asked = (row, text) => make("div", { className: "asked" }, picturesOf(row), textOf(text, text !== row.prompt));

/** A picture of another site is only linked: neither this page nor its service fetches it. */
function picturesOf({ pictures, more_pictures }) {
  const shown = pictures.map(({ url, thumbnail }) =>
    thumbnail ? make("img", { src: thumbnail, alt: "Picture of this row" })
      : url ? make("a", { href: url, target: "_blank", rel: "noreferrer noopener", textContent: url })
      : make("span", { className: "quiet", textContent: "a picture that cannot be shown" }));
  if (more_pictures) shown.push(make("span", { className: "quiet", textContent: `and ${plural(more_pictures, "picture")} more` }));
  return make("div", { className: "pictures" }, ...shown);
}

function fillTrial({ model, rows, estimate }) {
  $("trial").hidden = false;
  $("trial-rows").replaceChildren(...rows.map((row) => make("tr", {},
    make("td", { textContent: number(row.row) }),
    cell("", textOf(row.error || row.answer, row.error), make("p", { className: "quiet small", textContent: `${row.seconds.toFixed(1)} s · ${plural(row.prompt_tokens, "token")} in, ${number(row.completion_tokens)} out` })))));
  setText($("estimate"), estimate
    ? `${plural(estimate.rows, "row")} like these, answered by ${model}: about ${number(estimate.prompt_tokens)} tokens in and ${number(estimate.completion_tokens)} out, and ${duration(estimate.seconds)} if ${plural(estimate.in_flight, "request")} at a time are answered as fast as these.`
    : "No row was answered, so nothing can be said about the whole workbook.");
  $("estimate").dataset.tone = estimate ? "now" : "bad";
}

// ---- the run

function showRun(session) {
  const { stage, split, execution, analysis } = session;
  const begun = execution.status !== "idle";
  const reading = !split.ready_for_next_stage && split.status !== "not_started";
  $("before-run").hidden = begun || stage === "failed";
  const rows = split.ready_for_next_stage ? split.tasks : analysis?.rows ?? 0;
  setText($("start-hint"), `Start asks ${plural(rows, "row")}${state.endpoint ? ` of ${state.endpoint.url}, model ${$("model").value.trim() || state.endpoint.model || "unknown"}` : ""}.`);
  setText($("try"), `Try the first ${rows === 1 ? "row" : `${number(Math.min(rows, FIRST_ROWS))} rows`}`);
  $("splitting").hidden = !reading;
  $("split-bar").value = split.progress;
  setText($("split-text"), `Reading the rows: ${Math.floor(split.progress)} % · ${split.message}${split.status === "saving" ? " — not ready yet" : ""}`);
  $("running").hidden = !begun || reading;
  $("running").dataset.tone = tone(session);
  $("run-bar").value = execution.progress;
  setText($("run-text"), `${Math.floor(execution.progress)} % · ${execution.waiting && !execution.paused && !execution.cancelled ? "waiting" : execution.message}${execution.saving ? " — not ready yet" : ""}`);
  const waits = stage === "executing" && execution.waiting && !execution.saving;
  if ($("waiting").hidden !== !waits) lookNow();  // it may have gone, or come back
  $("waiting").hidden = !waits;
  $("waiting").dataset.tone = isQueued(execution) ? "warn" : "bad";
  if (waits) setText($("waiting"), `${capital(execution.waiting)}. It has been so since ${atTime(execution.waiting_since)}. No row is lost: the run goes on by itself.`);
  showNumbers(execution);
  const open = begun && stage !== "failed" && stage !== "completed" && !execution.saving && !execution.cancelled;
  $("pause").hidden = !open || execution.paused;
  $("resume").hidden = !open || !execution.paused;
  $("cancel").hidden = !open;
  setText($("failure"), split.error || execution.error);
}

function showNumbers({ total, done, failed, running, rate, seconds_left, prompt_tokens, completion_tokens, retries, status, waiting }) {
  const moving = status === "running";
  const rows = [["Done", `${number(done)} of ${number(total)}`], ["Failed", number(failed), failed ? "bad" : ""]];
  if (moving) rows.push(["Running", number(running)]);
  if (moving && rate && !waiting) rows.push(rate < 1 ? ["Rows/min", (rate * 60).toFixed(1)] : ["Rows/s", rate.toFixed(1)]);
  if (moving && seconds_left !== null && !waiting) rows.push(["Time left", duration(seconds_left)]);
  if (retries) rows.push(["Asked again", number(retries)]);
  if (completion_tokens) rows.push(["Tokens in, out", `${number(prompt_tokens)}, ${number(completion_tokens)}`]);
  // The elements stay, so that a selection or a screen reader in them is not thrown out four times a second.
  const list = $("numbers");
  while (list.children.length > rows.length) list.lastChild.remove();
  rows.forEach(([name, value, colour = ""], index) => {
    const pair = list.children[index] ?? list.appendChild(make("div", {}, make("dt"), make("dd")));
    setText(pair.firstChild, name);
    setText(pair.lastChild, value);
    pair.dataset.tone = colour;
  });
}

// ---- the answers

function showAnswers(session) {
  const { execution, stage, split } = session;
  const ready = execution.ready_for_download;
  const plainLink = ready && !savedKey();
  $("download").disabled = !ready;
  setText($("download-hint"), ready ? "Your workbook, with the answers in columns of their own." : "The download opens when the answers are saved.");
  $("download").hidden = plainLink;
  $("download-link").hidden = !plainLink;
  if (plainLink) $("download-link").href = `api/download/${session.session_id}`;
  const left = execution.total - execution.done;
  const isOver = ready || (stage === "failed" && split.ready_for_next_stage && execution.status === "failed");
  $("retry").hidden = session.batch || !isOver || (ready && !left);
  setText($("retry"), againWhat(execution));
  showFailures(execution);
  $("answers-part").hidden = !(execution.done + execution.failed);
  if ($("answers-part").open) loadAnswers();
}

/** How many rows a retry would ask, because they are paid for. */
function againWhat({ total, done, failed }) {
  const unasked = total - done - failed;
  if (!unasked) return `Ask the ${plural(failed, "failed row")} again`;
  return failed ? `Ask the ${number(failed)} failed and the ${number(unasked)} unasked rows` : `Ask the ${plural(unasked, "unasked row")}`;
}

async function loadAnswers() {
  const { session_id, execution, stage } = state.session;
  const moving = stage === "executing";
  const key = [session_id, state.answersSkip, execution.done, execution.failed, stage].join();
  if (key === state.answersShown || (moving && Date.now() - state.answersAt < RENEW_MS)) return;
  Object.assign(state, { answersShown: key, answersAt: Date.now() });
  try {
    const found = await get(`api/execute/answers/${session_id}?skip=${state.answersSkip}&limit=${ANSWERS_PER_PAGE}`);
    if (state.id === session_id && state.answersShown === key) fillAnswers(found);
  } catch {
    state.answersShown = "";  // the next change of the session tries again
  }
}

function fillAnswers({ total, rows }) {
  const first = state.answersSkip;
  $("answer-rows").replaceChildren(...rows.map((row) => make("tr", {},
    make("td", { textContent: number(row.row) }),
    cell("Asked", asked(row, row.prompt)),
    cell("Answer", row.status === "waiting" ? make("p", { className: "text quiet", textContent: "not yet" })
      : textOf(row.status === "failed" ? `Failed: ${row.error}` : row.answer || "(an empty answer)", row.status === "failed")))));
  $("answers-pages").hidden = total <= ANSWERS_PER_PAGE;
  $("answers-back").disabled = first === 0;
  $("answers-on").disabled = first + rows.length >= total;
  setText($("answers-where"), `${number(first + 1)} to ${number(first + rows.length)} of ${number(total)}`);
}

function turnAnswers(by) {
  state.answersSkip = Math.max(0, state.answersSkip + by * ANSWERS_PER_PAGE);
  state.answersAt = 0;
  loadAnswers();
}
$("answers-part").addEventListener("toggle", () => { if ($("answers-part").open && state.session) loadAnswers(); });
$("answers-back").addEventListener("click", () => turnAnswers(-1));
$("answers-on").addEventListener("click", () => turnAnswers(1));

// ---- failed rows

function showFailures({ failed }) {
  $("failed").hidden = !failed;
  setText($("failed-title"), `${plural(failed, "row")} failed`);
  if (failed) loadFailures();
}

async function loadFailures() {
  const { session_id, execution, stage } = state.session;
  const moving = stage === "executing";
  const key = [session_id, state.failuresSkip, execution.failed, stage].join();
  if (key === state.failuresShown || (moving && Date.now() - state.failuresAt < RENEW_MS)) return;
  Object.assign(state, { failuresShown: key, failuresAt: Date.now() });
  try {
    const found = await get(`api/execute/failures/${session_id}?skip=${state.failuresSkip}&limit=${FAILURES_PER_PAGE}`);
    if (state.id === session_id && state.failuresShown === key) fillFailures(found);
  } catch {
    state.failuresShown = "";  // the next change of the session tries again
  }
}

function reasonItem({ error, count, rows, differs }, failed) {
  const bar = make("div", { className: "bar" });
  bar.style.width = `${100 * count / failed}%`;
  const which = `row${count === 1 ? "" : "s"} ${rows.map(number).join(", ")}${count > rows.length ? ", …" : ""}`;
  return make("li", {}, make("span", { className: "count", textContent: number(count) }),
    make("div", {}, make("span", { textContent: `${error}${differs ? " — and the like" : ""}` }), make("br"), make("span", { className: "quiet small", textContent: which })),
    bar);
}

function fillFailures({ failed, reasons, rows }) {
  const first = state.failuresSkip;
  $("reasons").replaceChildren(...reasons.map((reason) => reasonItem(reason, failed)));
  $("failed-rows").replaceChildren(...rows.map(({ row, error, http_status }) =>
    make("tr", {}, make("td", { textContent: number(row) }), make("td", { textContent: !http_status || error.includes(http_status) ? error : `${error} (HTTP ${http_status})` }))));
  $("failures-pages").hidden = failed <= FAILURES_PER_PAGE;
  $("failures-back").disabled = first === 0;
  $("failures-on").disabled = first + rows.length >= failed;
  setText($("failures-where"), `${number(first + 1)} to ${number(first + rows.length)} of ${number(failed)}`);
}

function turnFailures(by) {
  state.failuresSkip = Math.max(0, state.failuresSkip + by * FAILURES_PER_PAGE);
  state.failuresAt = 0;
  loadFailures();
}
$("failures-back").addEventListener("click", () => turnFailures(-1));
$("failures-on").addEventListener("click", () => turnFailures(1));

// ---- what a person does

/** `action` once, however often the button is pressed meanwhile; what goes wrong is said at `errorId`. */
function onPress(id, errorId, action) {
  let busy = false;
  $(id).addEventListener("click", async () => {
    if (busy) return;
    busy = true;
    setText($(errorId), "");
    try {
      await action();
    } catch (error) {
      setText($(errorId), error.status ? error.message : "The service does not answer. Please try again.");
    } finally {
      busy = false;
      wake();
    }
  });
}
const theSession = () => ({ session_id: state.id });

$("model").addEventListener("input", () => { if (state.session) showRun(state.session); });

function chosenAsking() {
  const asking = { model: $("model").value.trim(), system: $("system").value };
  if ($("max-tokens").value) asking.max_tokens = Number($("max-tokens").value);
  return asking;
}

onPress("start", "run-error", async () => {
  const open = state.session.split.status === "not_started";
  try {
    await post("api/run", { ...theSession(), ...(open ? changedChoices() : {}), ...chosenAsking() });
  } catch (error) {
    // Somebody has started it in another tab: that is what was wanted.
    if (error.status !== 400 || (await get(`api/sessions/${state.id}`)).execution.status === "idle") throw error;
  }
});
onPress("try", "run-error", async () => {
  const open = state.session.split.status === "not_started";
  $("try").disabled = true;
  try {
    const id = state.id;
    const found = await post("api/analyze/try", { ...theSession(), rows: FIRST_ROWS, ...(open ? changedChoices() : {}), ...chosenAsking() });
    if (id === state.id) fillTrial(found);
  } finally {
    $("try").disabled = false;
  }
});
onPress("retry", "download-error", () => post("api/execute/retry", theSession()));
onPress("pause", "run-error", () => post("api/execute/pause", theSession()));
onPress("resume", "run-error", () => post("api/execute/resume", theSession()));
onPress("cancel", "run-error", async () => {
  const sure = await ask("Cancel the run?", "Rows that are not answered yet are not asked. What was answered is saved.", "Cancel the run");
  if (sure) await post("api/execute/cancel", theSession());
});
onPress("delete", "session-error", () => removeSession(state.id, state.session?.name ?? "this session"));
onPress("download", "download-error", async () => {
  const answer = await call("GET", `api/download/${state.id}`);
  const name = /filename\*=UTF-8''(.*)$/.exec(answer.headers.get("Content-Disposition") ?? "");
  const url = URL.createObjectURL(await answer.blob());
  make("a", { href: url, download: name ? decodeURIComponent(name[1]) : "answers" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
});
$("sheet").addEventListener("change", async () => {
  setText($("run-error"), "");
  $("trial").hidden = true;
  try {
    const again = await post("api/analyze/again", { ...theSession(), sheet: $("sheet").value });
    show({ ...state.session, ...again });
  } catch (error) {
    setText($("run-error"), error.message);
  }
});

async function removeSession(id, name) {
  if (!await ask("Delete this session?", `${name}: its workbook, tasks and answers are removed. A run is ended.`, "Delete")) return;
  await call("DELETE", `api/sessions/${id}`);
  if (id === state.id) location.hash = "";
  refreshAll();
}

function ask(title, text, yes) {
  setText($("question-title"), title);
  setText($("question-text"), text);
  setText($("question-yes"), yes);
  $("question").returnValue = "";
  $("question").showModal();
  return new Promise((resolve) => $("question").addEventListener("close", () => resolve($("question").returnValue === "yes"), { once: true }));
}
$("question-no").addEventListener("click", () => $("question").close(""));
$("question-yes").addEventListener("click", () => $("question").close("yes"));

// ---- all sessions

let refreshAll = () => {};
async function followAll() {
  for (let misses = 0; ;) {
    try {
      if (!document.hidden) showAll((await get("api/sessions")).sessions);
      if (misses && !state.id) inTouch();
      misses = 0;
    } catch (error) {
      misses += 1;
      if (!state.id) outOfTouch(error);
    }
    await new Promise((resolve) => { refreshAll = resolve; setTimeout(resolve, misses ? 2000 : 4000); });
  }
}

function showAll(sessions) {
  $("no-sessions").hidden = sessions.length > 0;
  const items = new Map([...$("sessions").children].map((item) => [item.dataset.id, item]));
  sessions.forEach((session, index) => {
    const item = items.get(session.session_id) ?? sessionItem(session);
    items.delete(session.session_id);
    const isShown = session.session_id === state.session?.session_id;
    describe(item, isShown ? state.session : session);  // of that one we know more
    // Moving an element takes the focus from it, so only what is out of place is moved.
    if ($("sessions").children[index] !== item) $("sessions").insertBefore(item, $("sessions").children[index] ?? null);
  });
  items.forEach((item) => item.remove());
  markCurrent();
}

const itemOf = (id) => [...$("sessions").children].find((item) => item.dataset.id === id);
const describe = (item, session) => showState(item.querySelector(".pill"), session);

function sessionItem({ session_id, name, created_at }) {
  const remove = make("button", { className: "plain", textContent: "Delete", ariaLabel: `Delete ${name}` });
  remove.addEventListener("click", () => removeSession(session_id, name).catch((error) => outOfTouch(error)));
  const item = make("li", {},
    make("div", {}, make("a", { href: `#${session_id}`, textContent: name }), make("br"), make("span", { className: "quiet small", textContent: when(created_at) })),
    make("span", { className: "pill" }), remove);
  item.dataset.id = session_id;
  return item;
}

function markCurrent() {
  for (const item of $("sessions").children) {
    item.querySelector("a").ariaCurrent = item.dataset.id === state.id ? "page" : null;
  }
}

// ---- the endpoint: which one is asked, and whether it answers

let lookNow = () => {};
async function followEndpoint() {
  for (;;) {
    try {
      if (!document.hidden) showEndpoint(await get("api/endpoint"));
    } catch {
      // The service itself is away, and the page says so elsewhere.
    }
    await new Promise((resolve) => { lookNow = resolve; setTimeout(resolve, state.endpoint?.error ? AWAY_MS : ENDPOINT_MS); });
  }
}

function showEndpoint({ url, model, error }) {
  state.endpoint = { url, model, error };
  state.awaySince = error ? state.awaySince || Date.now() / 1000 : 0;
  $("endpoint").dataset.tone = error ? "bad" : "";
  $("endpoint-pill").dataset.tone = error ? "bad" : "good";
  setText($("endpoint-pill"), error ? "endpoint away" : "endpoint ready");
  setText($("endpoint-text"), error ? `${capital(error)}. Seen so since ${atTime(state.awaySince)}.` : `${url} · model ${model}`);
  if (state.session) showRun(state.session);
}

// ---- the address tells which session is shown, so that a reload and a second tab show the same

function open() {
  const id = location.hash.slice(1);
  if (id && id === state.id) return;
  Object.assign(state, { id, ...untouched() });
  state.turn += 1;
  for (const error of document.querySelectorAll(".error")) if (error.id !== "upload-error") setText(error, "");
  for (const field of [$("model"), $("system"), $("max-tokens"), $("template")]) field.value = "";
  const filled = ["found", "why", "notes", "sheet", "columns", "chips", "preview-rows", "trial-rows", "answer-rows", "reasons", "failed-rows", "waiting"];
  for (const element of filled) $(element).replaceChildren();
  $("start-page").hidden = Boolean(id);
  $("session").hidden = !id;
  $("delete").hidden = false;
  $("failures").open = $("answers-part").open = false;
  $("trial").hidden = $("session-pill").hidden = document.querySelector(".steps").hidden = true;
  setText($("session-name"), id ? "Session" : "");
  setText($("session-about"), "");
  setText($("announcer"), "");
  setText(document.querySelector("title"), "Batch sessions");
  markCurrent();
  wake();
  if (!id) return;
  follow(id);
  $("session-name").focus({ preventScroll: true });
  scrollTo(0, 0);
}
addEventListener("hashchange", open);
document.addEventListener("visibilitychange", () => refreshAll());
open();
followAll();
followEndpoint();
