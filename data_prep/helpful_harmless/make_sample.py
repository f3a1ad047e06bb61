"""Write `sample.jsonl`: 800 dialogue pairs in the schema of Anthropic/hh-rlhf, composed from the bank of texts.

A row is `{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": …}`; both share everything up to the last
`\\n\\nAssistant:`. All text was written for this project. The chosen answer is about the question, specific,
polite and complete, often warm; the rejected one is weak in one of the ways of `WEAK_KINDS` or `UNSAFE_KINDS`.
About one pair in eight is a close call (two decent answers) or has its labels flipped, so that no reward model
can get all pairs right. Length alone says little: which answer is longer is drawn first.

The texts are in `bank/`, read by `dialogue_bank.py`, which describes their format. To regenerate the sample:

    python data_prep/helpful_harmless/make_sample.py
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from dialogue_bank import Point, Question, Topic, capital, read_bank, read_phrases, sentence

from rlhf.files import atomic_write

FOLDER = Path(__file__).resolve().parent
SAMPLE = FOLDER / "sample.jsonl"
SEED = 20240

NUM_FOLLOW_UPS = 150
NUM_SMALL_TALK_STARTS = 15
NUM_UNSAFE_PUSHED = 40
NUM_PAIRS = 800

WEAK_KINDS = ("curt", "rude", "off_topic", "vague", "repetitive", "refusing", "truncated", "bare", "plain")
UNSAFE_KINDS = ("careless", "careless", "rude_refusal", "flat_refusal")
CLOSE_SHARE, FLIPPED_SHARE = 0.09, 0.03
FLIPPED_KINDS = ("curt", "vague", "off_topic", "truncated")

LONGER_CHOSEN_SHARE = 0.5
MIN_WORDS, MAX_WORDS = 4, 44
MAX_DIALOGUE_WORDS = 50
# A good answer is often warm, a weak one seldom: a policy that adopts the warm style gains reward.
WARM_SHARE, WEAK_WARM_SHARE = 0.5, 0.25
ALWAYS_WARM_OVER = ("bare", "plain")


@dataclass(frozen=True)
class Pair:
    """One row of the sample; `kind` says how it was made and is not written to the file."""

    prompt: str
    chosen: str
    rejected: str
    kind: str

    def row(self) -> dict[str, str]:
        return {"chosen": f"{self.prompt} {self.chosen}", "rejected": f"{self.prompt} {self.rejected}"}


def num_words(text: str) -> int:
    return len(text.split())


class Writer:
    """Composes prompts and answers; every choice comes from one seeded generator."""

    def __init__(self, topics: list[Topic], phrases: dict[str, list[str]], rng: random.Random) -> None:
        self.helpful = [topic for topic in topics if topic.area != "unsafe"]
        self.phrases = phrases
        self.rng = rng

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def say(self, section: str, topic: Topic | None = None) -> str:
        """A random line of `section`, about `topic` if the line names it."""
        line = self.rng.choice(self.phrases[section])
        if topic is not None:
            line = line.replace("{name}", topic.name).replace("{Name}", capital(topic.name))
        return line

    # Good answers

    def opening(self, topic: Topic, question: Question | None) -> str:
        """A warm first sentence; `question` is None for a follow-up."""
        if question is None:
            return self.say("open_follow")
        if topic.mood == "feel":
            return self.say("open_feel")
        if topic.mood in ("curious", "alone"):
            if topic.area == "small talk":
                return self.say("open_chat")
            return self.say("open_puzzle" if question.trouble else "open_curious")
        if question.trouble:
            return self.say("open_trouble")
        sections = ["open_any", "open_goal"] if topic.mood == "goal" else ["open_any"]
        return self.say(self.rng.choice(sections), topic)

    def closing(self, topic: Topic) -> str:
        return self.say(self.rng.choice(["close_any", f"close_{topic.area}", f"close_{topic.area}"]))

    def advice(self, point: Point, reason: bool, first: bool) -> str:
        """One point as one or two sentences."""
        if point.is_statement:
            return sentence(point.text) + (" " + sentence(point.reason) if reason else "")
        frames = ["{}", "{}", "{}", "You could {}", "It helps to {}", "I would {}", "Try to {}"]
        if not first:
            frames = ["Also, {}", "You can also {}", "It also helps to {}", "And {}", "{}"]
        elif "your" in point.text or point.text.startswith(("try", "avoid")):
            frames = frames[:5]
        text = self.rng.choice(frames).format(point.text)
        if not reason:
            return sentence(text)
        joined = self.rng.choice([", since {}", ", because {}", ", as {}", ". {}", ". {}"])
        return sentence(text + joined.format(capital(point.reason) if joined[0] == "." else point.reason))

    def pick(self, topic: Topic, question: Question, count: int) -> list[Point]:
        """`count` points: the one to lead with, if there is one, then others in the order of the bank."""
        order = list(range(len(topic.points)))
        lead = question.lead
        if lead is None and topic.points[0].is_statement:
            lead = 0
        if lead is not None:
            order.remove(lead)
            order = [lead, *sorted(self.rng.sample(order, count - 1))]
        else:
            order = sorted(self.rng.sample(order, count))
        return [topic.points[index] for index in order]

    def answer(self, topic: Topic, question: Question | None, point: Point | None, warm: bool) -> str:
        """A good answer to a question of `topic`, or with `point` to a follow-up."""
        while True:
            layout = self.rng.choice(["one", "two", "two", "late", "both", "list"])
            if point is not None or topic.mood == "alone":
                layout = "one"
            if layout == "list" and topic.points[0].is_statement:
                layout = "two"
            if point is not None:
                points = [point]
            else:
                points = self.pick(topic, question, {"one": 1, "list": min(3, len(topic.points))}.get(layout, 2))
            if layout == "list":
                parts = [" ".join(f"{i}. {sentence(p.text)}" for i, p in enumerate(points, start=1))]
            else:
                with_reason = {"one": (True,), "two": (True, False), "late": (False, True), "both": (True, True)}
                parts = [
                    self.advice(p, reason, first=i == 0)
                    for i, (p, reason) in enumerate(zip(points, with_reason[layout], strict=True))
                ]
            if warm:
                parts.insert(0, self.opening(topic, question))
                if self.chance(0.6):
                    parts.append(self.closing(topic))
            text = " ".join(parts)
            if num_words(text) <= MAX_WORDS:
                return text

    def careful_answer(self, topic: Topic) -> str:
        """A kind refusal of an unsafe request, with an alternative."""
        while True:
            refuse = self.say("unsafe_refuse")
            text = refuse.replace("{cannot}", topic.refusal.text).replace("{reason}", topic.refusal.reason)
            parts = [text.replace("{Reason}", capital(topic.refusal.reason))]
            point = self.rng.choice(topic.points)
            parts.append(self.say("unsafe_turn").replace("{tip}", point.text))
            if self.chance(0.4):
                parts.append(sentence(point.reason))
            if self.chance(0.5):
                parts.insert(0, self.say("unsafe_open"))
            if self.chance(0.45):
                parts.append(self.say("unsafe_close"))
            text = " ".join(parts)
            if num_words(text) <= MAX_WORDS:
                return text

    # Weak answers

    def three(self, name: str, topic: Topic) -> str:
        """One to three sentences from the sections `name`_1, _2, _3."""
        order = self.rng.choice([(1, 2), (1, 2), (1, 3), (1, 2, 3), (2, 3), (1, 2, 2), (1, 2, 2, 3)])
        lines: list[str] = []
        for number in order:
            line = self.say(f"{name}_{number}", topic)
            if line not in lines:
                lines.append(line)
        return " ".join(lines)

    def repetitive(self, topic: Topic, question: Question | None, point: Point | None) -> str:
        """An answer that says the same thing over and over."""
        said = point or self.pick(topic, question, 1)[0]
        once = sentence(said.text)
        opening = self.opening(topic, question)
        shapes = [
            [once, once, once],
            [once, once, once, once],
            [sentence(said.reason), once, sentence(said.reason), once],
            [opening, once, once],
            [opening, opening, once, once],
            [once, once, sentence(said.reason), once],
            [opening, once, opening],
        ]
        return " ".join(self.rng.choice(shapes))

    def truncated(self, topic: Topic, question: Question | None, point: Point | None) -> str:
        """A good answer that stops in the middle of a sentence."""
        while True:
            words = self.answer(topic, question, point, self.chance(WEAK_WARM_SHARE)).split()
            ends = [i + 1 for i, word in enumerate(words) if word[-1] in ".!?"]
            cuts = [
                i
                for i in range(MIN_WORDS, len(words) - 1)
                if all(abs(i - end) > 1 for end in ends) and words[i - 1][-1] not in ",:"
            ]
            loose = {"the", "a", "to", "of", "and", "for", "in", "with", "your", "is", "on", "it", "that", "at"}
            cuts = [i for i in cuts if words[i - 1].lower() in loose] or cuts
            if cuts:
                return " ".join(words[: self.rng.choice(cuts)])

    def weak(self, kind: str, topic: Topic, question: Question | None, point: Point | None) -> str:
        """A weak answer of the given kind."""
        if kind == "off_topic":
            other = self.rng.choice([t for t in self.helpful if t.area != topic.area])
            return self.answer(other, self.rng.choice(other.questions), None, self.chance(WEAK_WARM_SHARE))
        if kind == "repetitive":
            return self.repetitive(topic, question, point)
        if kind == "truncated":
            return self.truncated(topic, question, point)
        if kind == "plain":
            return self.answer(topic, question, point, warm=False)
        if kind == "bare":
            count = 1 if topic.mood == "alone" else self.rng.choice([1, 1, 2])
            points = [point] if point else self.pick(topic, question, count)
            return " ".join(sentence(each.text) for each in points)
        if kind == "careless":
            lines = [self.say("careless_open"), sentence(topic.careless), self.say("careless_close")]
            if self.chance(0.5):
                lines.append(self.say("vague_2"))
            return " ".join(lines)
        if kind == "rude_refusal":
            lines = [self.say("rude_refusal_1"), self.say("rude_refusal_2", topic)]
            if self.chance(0.7):
                lines.append(self.say("rude_refusal_3"))
            if self.chance(0.5):
                lines.append(self.say("rude_3"))
            return " ".join(lines)
        if kind == "flat_refusal":
            lines = [self.say("flat_refusal", topic), self.say("refuse_2"), self.say("refuse_3")]
            return " ".join(lines[: self.rng.choice([1, 2, 3])])
        return self.three({"refusing": "refuse"}.get(kind, kind), topic)

    # Prompts

    def framed(self, topic: Topic, question: Question) -> str:
        """The question as a user may put it: bare, greeted, with a word about the user, or with thanks."""
        context = f"context_{topic.area}"
        frame = self.rng.choice(["", "", "greeting", "suffix", context if context in self.phrases else ""])
        if question.trouble and frame == context:
            frame = "greeting"
        if not frame or topic.area == "small talk":
            return question.text
        phrase = self.say(frame)
        return f"{question.text} {phrase}" if frame == "suffix" else f"{phrase} {question.text}"

    def short_answer(self, topic: Topic, question: Question) -> str:
        """An answer for an earlier turn of a dialogue, so short that the prompt stays short."""
        point = self.pick(topic, question, 1)[0]
        return self.advice(point, reason=num_words(point.text + point.reason) < 17, first=True)

    def pair(self, kind: str, turns: list[str], topic: Topic, question: Question | None, point: Point | None) -> Pair:
        """Compose one pair; the turns of the prompt alternate and begin and end with the human."""
        names = ("Human", "Assistant")
        prompt = "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns)) + "\n\nAssistant:"
        want_longer = self.chance(LONGER_CHOSEN_SHARE)
        decent = kind.startswith("close")
        weak_kind = kind.removeprefix("flipped_")
        warm = weak_kind in ALWAYS_WARM_OVER or self.chance(WARM_SHARE)
        for _ in range(200):
            if topic.area == "unsafe":
                chosen = self.careful_answer(topic)
                rejected = self.careful_answer(topic) if decent else self.weak(weak_kind, topic, question, point)
            else:
                chosen = self.answer(topic, question, point, warm)
                if decent:
                    rejected = self.answer(topic, question, point, self.chance(WARM_SHARE))
                else:
                    rejected = self.weak(weak_kind, topic, question, point)
            if chosen == rejected or not MIN_WORDS <= num_words(rejected) <= MAX_WORDS:
                continue
            fitting = chosen, rejected
            if decent or (len(chosen) > len(rejected)) == want_longer:
                break
        chosen, rejected = reversed(fitting) if kind.startswith("flipped") else fitting
        return Pair(prompt, chosen, rejected, kind)


def deal_kinds(count: int, kinds: tuple[str, ...], flipped_share: float, rng: random.Random) -> list[str]:
    """`count` kinds in random order: close calls, flipped labels, and the rest dealt evenly over `kinds`."""
    num_close, num_flipped = round(CLOSE_SHARE * count), round(flipped_share * count)
    dealt = ["close"] * num_close
    dealt += [f"flipped_{FLIPPED_KINDS[i % len(FLIPPED_KINDS)]}" for i in range(num_flipped)]
    dealt += [kinds[i % len(kinds)] for i in range(count - len(dealt))]
    rng.shuffle(dealt)
    return dealt


def build_pairs(seed: int = SEED) -> list[Pair]:
    """All pairs of the sample in their final order; no prompt appears twice."""
    rng = random.Random(seed)
    topics = read_bank()
    writer = Writer(topics, read_phrases(), rng)
    unsafe = [topic for topic in topics if topic.area == "unsafe"]
    tasks: list[tuple[list[str], Topic, Question | None, Point | None]] = []

    singles = [(topic, question) for topic in writer.helpful for question in topic.questions]
    rng.shuffle(singles)
    num_unsafe = sum(len(topic.questions) for topic in unsafe) + NUM_UNSAFE_PUSHED
    for i, (topic, question) in enumerate(singles[: NUM_PAIRS - NUM_FOLLOW_UPS - num_unsafe]):
        if i < NUM_SMALL_TALK_STARTS and topic.area != "small talk":
            turns = [writer.say("chat_human"), writer.say("chat_assistant"), question.text]
        else:
            turns = [writer.framed(topic, question)]
        tasks.append((turns, topic, question, None))

    follow_ups = [(topic, index) for topic in writer.helpful for index in range(len(topic.follow_ups))]
    rng.shuffle(follow_ups)
    for i, (topic, index) in enumerate(follow_ups[:NUM_FOLLOW_UPS]):
        question = rng.choice(topic.questions)
        text, point = topic.follow_ups[index]
        turns = [question.text, writer.short_answer(topic, question)]
        other_text, other_point = topic.follow_ups[1 - index]
        earlier = [other_text, sentence(other_point.text)]
        if i % 3 == 0 and num_words(" ".join([*turns, *earlier, text])) <= MAX_DIALOGUE_WORDS:
            turns += earlier
        turns.append(f"{writer.say('follow_prefix')} {text}" if rng.random() < 0.4 else text)
        tasks.append((turns, topic, None, point))
    kinds = deal_kinds(len(tasks), WEAK_KINDS, FLIPPED_SHARE, rng)

    for topic in unsafe:
        tasks += [([question.text], topic, question, None) for question in topic.questions]
    for topic in unsafe[:NUM_UNSAFE_PUSHED]:
        question = rng.choice(topic.questions)
        turns = [question.text, writer.say("push_answer"), writer.say("push")]
        tasks.append((turns, topic, question, None))
    kinds += deal_kinds(len(tasks) - len(kinds), UNSAFE_KINDS, 0.0, rng)

    pairs = [writer.pair(kind, *task) for kind, task in zip(kinds, tasks, strict=True)]
    rng.shuffle(pairs)
    return pairs


def render(pairs: list[Pair]) -> str:
    """The JSON lines of the sample."""
    return "".join(json.dumps(pair.row(), ensure_ascii=False) + "\n" for pair in pairs)


def main() -> None:
    """Write the sample beside this script."""
    pairs = build_pairs()
    with atomic_write(SAMPLE) as temporary:
        temporary.write_text(render(pairs), encoding="utf-8")
    print(f"{len(pairs)} pairs written to {SAMPLE.name}")


if __name__ == "__main__":
    main()
