/* The page: asks a campaign's question, sends ratings, shows the average as it moves.

   Sending. The id of a rating is made here, before the first attempt, and every further
   attempt carries the same one. So a rating whose answer got lost is sent again without
   fear: the service counts an id once.

   Watching. The average comes as server-sent events. The browser connects again by itself
   after a break, but gives up for good when an answer is not a stream (a proxy's 502, a 503);
   then this page does it. While the tab is hidden the stream is closed: a browser opens six
   connections to a host, and forgotten tabs would use them up.

   What comes from outside goes into the page as text, never as markup. */

const page = new URLSearchParams(location.search);
const campaignName = page.get("campaign") || "default";
const item = page.get("item") || null;

// Milliseconds. Attempts spread over some 15 s, enough for a service to be restarted; after
// that the visitor decides.
const FIRST_PAUSE = 400;
const LONGEST_PAUSE = 8_000;
const ATTEMPTS = 7;
const ANSWER_TIMEOUT = 10_000;

// How long a digit waits for the next one where another number begins with it: 1, 10.
const TYPING_PAUSE = 600;

// A tab that is only just hidden often comes back.
const HIDDEN_PAUSE = 3_000;

const MOST_FACES = 5;
const MOST_BIG_BUTTONS = 12;

const FACE_LABELS = {
  2: ["Bad", "Good"],
  3: ["Bad", "Okay", "Good"],
  4: ["Very bad", "Bad", "Good", "Very good"],
  5: ["Very bad", "Bad", "Okay", "Good", "Very good"],
};

// The campaign shown; `begin` fills it before anything else runs.
let campaign = null;

const number = new Intl.NumberFormat("en");
const byId = (id) => document.getElementById(id);
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
// Half of it for sure, half by chance: clients that failed together do not return together.
const pause = (attempt) =>
  Math.min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** attempt) * (0.5 + Math.random() / 2);

// The scale ---------------------------------------------------------------------------------

/** Build the buttons of the campaign's scale. */
function buildScale() {
  const group = byId("scale");
  const rates = allRates();
  const faces = FACE_LABELS[rates.length];
  const buttons = rates.map((rate, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.rate = rate;
    button.setAttribute("aria-pressed", "false");
    if (faces) {
      const label = document.createElement("span");
      label.textContent = faces[index];
      button.append(drawFace(index / (rates.length - 1)), label);
      button.setAttribute("aria-label", `${faces[index]}, ${rate} of ${campaign.maximum}`);
    } else {
      button.textContent = rate;
      button.setAttribute("aria-label", `${rate} of ${campaign.maximum}`);
    }
    return button;
  });
  group.dataset.look = faces ? "faces" : rates.length > MOST_BIG_BUTTONS ? "dense" : "numbers";
  group.style.setProperty("--columns", rates.length);
  const narrow = rates.length > MOST_FACES + 1 ? Math.ceil(rates.length / 2) : rates.length;
  group.style.setProperty("--columns-narrow", narrow);
  group.replaceChildren(...buttons);
  byId("ends").hidden = Boolean(faces);
  byId("lowest").textContent = campaign.minimum;
  byId("highest").textContent = campaign.maximum;
  moveByKeys(group, buttons);
  group.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    // The second click of a double click is the same wish, not another rating.
    if (button && event.detail <= 1) {
      give(Number(button.dataset.rate));
    }
  });
}

/** One stop for Tab, arrows within (the toolbar pattern of ARIA), digits as a short cut. */
function moveByKeys(group, buttons) {
  let typed = "";
  let timer = 0;
  const rates = buttons.map((button) => button.dataset.rate);

  const focusOn = (index) => {
    buttons.forEach((button, at) => (button.tabIndex = at === index ? 0 : -1));
    buttons[index].focus();
  };
  const finish = () => {
    const index = rates.indexOf(typed);
    typed = "";
    if (index >= 0) {
      buttons[index].click();
    }
  };
  const type = (character) => {
    clearTimeout(timer);
    const begins = (text) => rates.some((rate) => rate.startsWith(text));
    typed = begins(typed + character) ? typed + character : begins(character) ? character : "";
    const index = rates.indexOf(typed);
    if (index >= 0) {
      focusOn(index);
    }
    const mayGrow = rates.some((rate) => rate.startsWith(typed) && rate !== typed);
    if (typed && mayGrow) {
      timer = setTimeout(finish, TYPING_PAUSE);
    } else {
      finish();
    }
  };

  buttons.forEach((button, at) => (button.tabIndex = at === 0 ? 0 : -1));
  group.addEventListener("focusin", (event) => {
    const index = buttons.indexOf(event.target);
    buttons.forEach((button, at) => (button.tabIndex = at === index ? 0 : -1));
  });
  // Digits belong to the group only while it has the focus, also those half typed.
  group.addEventListener("focusout", (event) => {
    if (!group.contains(event.relatedTarget)) {
      clearTimeout(timer);
      typed = "";
    }
  });
  group.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) {
      return;
    }
    const at = buttons.indexOf(document.activeElement);
    const last = buttons.length - 1;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      focusOn((at + step + buttons.length) % buttons.length);
    } else if (event.key === "Home" || event.key === "End") {
      focusOn(event.key === "Home" ? 0 : last);
    } else if (/^[0-9-]$/.test(event.key)) {
      if (!event.repeat) {
        type(event.key);
      }
    } else {
      if (event.key === "Enter" || event.key === " ") {
        clearTimeout(timer);
        typed = "";
      }
      // A key held down is one rating.
      if (!(event.key === "Enter" && event.repeat)) {
        return;
      }
    }
    event.preventDefault();
  });
}

/** Draw a face. `mood` goes from 0, sad, to 1, happy. */
function drawFace(mood) {
  const draw = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [attribute, value] of Object.entries(attributes)) {
      element.setAttribute(attribute, value);
    }
    return element;
  };
  const face = draw("svg", { class: "face", viewBox: "0 0 40 40", "aria-hidden": "true" });
  const bend = (mood - 0.5) * 12;
  face.append(
    draw("circle", { cx: 20, cy: 20, r: 18 }),
    draw("circle", { class: "eye", cx: 14, cy: 16, r: 2.2 }),
    draw("circle", { class: "eye", cx: 26, cy: 16, r: 2.2 }),
    draw("path", { d: `M12.5 ${26.5 - bend / 2}Q20 ${26.5 + bend} 27.5 ${26.5 - bend / 2}` }),
  );
  return face;
}

function allRates() {
  const { minimum, maximum } = campaign;
  return Array.from({ length: maximum - minimum + 1 }, (_, index) => minimum + index);
}

// Giving a rating ---------------------------------------------------------------------------

const unsent = new Map();
let latest = null;

function give(rate) {
  const rating = { id: newId(), rate, campaign: campaignName };
  if (item !== null) {
    rating.item = item;
  }
  showMine(rate);
  send(rating);
}

/** What the visitor sees of a rate: the number, or the name of the face. */
function nameOf(rate) {
  const faces = FACE_LABELS[campaign.maximum - campaign.minimum + 1];
  return faces ? `“${faces[rate - campaign.minimum]}”` : String(rate);
}

async function send(rating) {
  latest = rating.id;
  unsent.delete(rating.id);
  say(`Thanks, you gave ${nameOf(rating.rate)}.`);
  const refusal = await deliver(rating);
  if (refusal && refusal.final) {
    say(`Your ${nameOf(rating.rate)} was not accepted: ${refusal.text}`, "failed");
  } else if (refusal) {
    unsent.set(rating.id, rating);
    const what = unsent.size === 1 ? `Your ${nameOf(rating.rate)}` : `${unsent.size} ratings`;
    say(`${what} could not be sent: ${refusal.text}`, "failed");
  } else if (latest === rating.id && unsent.size === 0) {
    say(`Thanks, you gave ${nameOf(rating.rate)}.`);
  }
  byId("again").hidden = unsent.size === 0;
}

/** Send until it is stored. Returns null, or why not: `final` where trying again is useless. */
async function deliver(rating) {
  let text = "the service cannot be reached.";
  for (let attempt = 0; attempt < ATTEMPTS; attempt += 1) {
    if (attempt > 0) {
      if (latest === rating.id) {
        say(`Thanks, you gave ${nameOf(rating.rate)}. Still sending…`);
      }
      await sleep(pause(attempt - 1));
    }
    let answer;
    try {
      answer = await post(rating);
    } catch {
      // No answer: it may have been stored or not. The same id makes the next attempt safe.
      text = "the service cannot be reached.";
      continue;
    }
    if (answer.ok) {
      return null;
    }
    text = (await detailOf(answer)) || `the service answered ${answer.status}.`;
    if (answer.status < 500 && answer.status !== 408 && answer.status !== 429) {
      return { final: true, text };
    }
  }
  return { final: false, text };
}

async function post(rating) {
  const controller = new AbortController();
  const timer = setTimeout(() => controller.abort(), ANSWER_TIMEOUT);
  try {
    return await fetch("rate", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(rating),
      // A visitor who rates and leaves at once is counted too.
      keepalive: true,
      signal: controller.signal,
    });
  } finally {
    clearTimeout(timer);
  }
}

async function detailOf(answer) {
  try {
    return (await answer.json()).detail;
  } catch {
    return "";
  }
}

function newId() {
  if (crypto.randomUUID) {
    return crypto.randomUUID();
  }
  // randomUUID exists over https and on localhost only; random values exist everywhere.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

function say(text, state = "") {
  const said = byId("said");
  said.dataset.state = state;
  if (said.textContent !== text) {
    said.textContent = text;
  }
}

function showMine(rate) {
  for (const button of byId("scale").children) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.rate) === rate));
  }
  for (const row of byId("bars").children) {
    row.toggleAttribute("data-mine", Number(row.dataset.rate) === rate);
  }
}

// Showing the average -----------------------------------------------------------------------

function buildBars() {
  const rates = allRates();
  const list = byId("bars");
  list.dataset.look = rates.length > MOST_BIG_BUTTONS ? "dense" : "numbers";
  list.replaceChildren(
    ...rates.map((rate) => {
      const row = document.createElement("li");
      row.dataset.rate = rate;
      const column = document.createElement("span");
      column.className = "column";
      column.append(document.createElement("span"));
      column.firstChild.className = "bar";
      const label = document.createElement("span");
      label.className = "label";
      label.setAttribute("aria-hidden", "true");
      label.textContent = rate;
      const text = document.createElement("span");
      text.className = "unseen";
      row.append(column, label, text);
      return row;
    }),
  );
  byId("out-of").textContent = `of ${number.format(campaign.maximum)}`;
}

function showTotal(total) {
  const average = total.count ? total.average.toFixed(2) : "–";
  const shown = byId("average");
  if (shown.textContent !== average) {
    shown.textContent = average;
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
      shown.animate([{ opacity: 0.4 }, { opacity: 1 }], { duration: 350, easing: "ease-out" });
    }
  }
  shown.toggleAttribute("data-empty", !total.count);
  byId("out-of").hidden = !total.count;
  byId("taken").textContent = takenText(total);
  const counted = `${number.format(total.count)} ${total.count === 1 ? "rating" : "ratings"}`;
  byId("counted").textContent = total.count > 1 ? `all ${counted}` : total.count ? counted : "\u00a0";
  const distribution = total.distribution || {};
  const most = Math.max(1, ...Object.values(distribution));
  for (const row of byId("bars").children) {
    const given = distribution[row.dataset.rate] || 0;
    row.toggleAttribute("data-given", given > 0);
    row.querySelector(".bar").style.setProperty("--share", given / most);
    row.title = `${row.dataset.rate}: ${number.format(given)}`;
    row.querySelector(".unseen").textContent = `${row.dataset.rate}: ${number.format(given)}`;
  }
}

function takenText({ count, n }) {
  if (!count) {
    return "no ratings yet";
  }
  if (count === 1) {
    return "the only rating so far";
  }
  return n === count
    ? `average of all ${number.format(n)} ratings`
    : `average of the last ${number.format(n)}`;
}

// Watching ----------------------------------------------------------------------------------

const LIVE_TEXT = {
  live: "live",
  broken: "reconnecting…",
  trouble: "the numbers cannot be read right now",
};

function watch() {
  let source = null;
  let failures = 0;
  let timer = 0;

  const show = (state) => {
    const live = byId("live");
    live.dataset.state = state === "live" ? "live" : "broken";
    live.textContent = LIVE_TEXT[state];
  };
  const close = () => {
    clearTimeout(timer);
    if (source) {
      source.close();
    }
    source = null;
  };
  const open = () => {
    close();
    const query = item === null ? "" : `?${new URLSearchParams({ item })}`;
    source = new EventSource(`api/campaigns/${encodeURIComponent(campaignName)}/live${query}`);
    source.addEventListener("total", (event) => {
      failures = 0;
      show("live");
      showTotal(JSON.parse(event.data));
    });
    source.addEventListener("trouble", () => show("trouble"));
    source.addEventListener("error", () => {
      show("broken");
      if (source.readyState === EventSource.CLOSED) {
        clearTimeout(timer);
        timer = setTimeout(open, Math.max(1_000, pause(failures)));
        failures += 1;
      }
    });
  };

  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (document.hidden) {
      timer = setTimeout(close, HIDDEN_PAUSE);
    } else if (!source || source.readyState === EventSource.CLOSED) {
      open();
    }
  });
  open();
}

// Beginning ---------------------------------------------------------------------------------

async function loadCampaign() {
  for (let attempt = 0; ; attempt += 1) {
    try {
      const answer = await fetch(`api/campaigns/${encodeURIComponent(campaignName)}`);
      if (answer.ok) {
        return await answer.json();
      }
      if (answer.status === 404) {
        return null;
      }
    } catch {
      // Falls through: an answer that never came and a 503 are the same to a visitor.
    }
    say("The service cannot be reached. Trying again…", "failed");
    await sleep(pause(Math.min(attempt + 1, 6)));
  }
}

async function begin() {
  campaign = await loadCampaign();
  if (campaign === null) {
    byId("question").textContent = "There is no such campaign";
    say(`No campaign is named “${campaignName}”. Is the address right?`, "failed");
    document.querySelector(".result").hidden = true;
    byId("scale").hidden = true;
    return;
  }
  say("");
  document.title = `${campaign.question} · Molva`;
  byId("question").textContent = campaign.question;
  if (item !== null) {
    byId("item").textContent = item;
    byId("item").hidden = false;
  }
  buildScale();
  buildBars();
  byId("again").addEventListener("click", () => [...unsent.values()].forEach(send));
  watch();
}

begin();
