"""The embedded world: a seeded generator of English-like documents whose ground truth is known.

Five kinds of document: `fact` (recall), `list` (short or long, with a stop), `headline` (five topics), `roll_call`
(names, often repeated), `review` (sentiment). Ground truth is a set of spans in code points of the text:

- `fact`: the answer of a fact; value "entity|attribute"
- `list_stop`: the newline from which the list ends; value = number of items
- `repeated_name`: a person's name that stood earlier in the same document; value = the name
- `topic`: from the last letter of the first headline's subject, which gives it away, to the end of the document
- `sentiment`: from the first sentence that gives it away to the verdict
- `topic_due`, `sentiment_due`: the one place after which it has to be named
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import words

TRAINING_SEED = 20_260_101
TOPICS = tuple(words.HEADLINES)
KIND_WEIGHTS = {"fact": 30, "list": 15, "headline": 11, "roll_call": 34, "review": 10}
WORDINGS_PER_ATTRIBUTE = 8
LONGEST_CHANT = 12


@dataclass(frozen=True)
class Span:
    """A labelled stretch of a document: `start` and `end` in code points, end excluded."""

    label: str
    start: int
    end: int
    value: str


@dataclass(frozen=True)
class Document:
    """One generated document: its text, its kind, flat metadata and the ground truth as spans."""

    text: str
    kind: str
    metadata: dict[str, str | int]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Fact:
    """One thing that is true in this world: `attribute` of `entity` is `answer`; two wordings are never used for it."""

    entity: str
    attribute: str
    answer: str
    wordings: tuple[str, ...]
    held_out: tuple[int, int]

    def question(self, wording: int) -> str:
        """The sentence up to its answer, without the space before the answer."""
        return self.wordings[wording].format(name=self.entity)

    def unseen_questions(self) -> list[str]:
        """The held-out questions that are not the end of a longer one in use ("On stage Ada plays the")."""
        used = [self.question(wording) for wording in range(WORDINGS_PER_ATTRIBUTE) if wording not in self.held_out]
        held_out = [self.question(wording) for wording in self.held_out]
        return [question for question in held_out if not any(longer.endswith(question) for longer in used)]


@dataclass
class Writer:
    """Collects text and the spans that label it."""

    text: str = ""
    spans: list[Span] = field(default_factory=list)

    def add(self, piece: str, label: str | None = None, value: str = "") -> None:
        """Append `piece`; with a label the words of the piece (not its leading space) become a span."""
        start = len(self.text) + len(piece) - len(piece.lstrip(" "))
        self.text += piece
        if label is not None:
            self.spans.append(Span(label, start, len(self.text), value))

    def cover(self, label: str, start: int, value: str) -> None:
        """Label everything from `start` to the present end."""
        self.spans.append(Span(label, start, len(self.text), value))


def all_facts() -> tuple[Fact, ...]:
    """Every fact of the world, in a fixed order: people first, then cities."""
    chooser = random.Random(7)
    facts: list[Fact] = []
    for entities, attributes in ((words.PEOPLE, words.PERSON_WORDINGS), (words.CITIES, words.CITY_WORDINGS)):
        for column, (attribute, (values, wordings)) in enumerate(attributes.items()):
            answers = [values[index % len(values)] for index in range(len(entities))]
            chooser.shuffle(answers)
            for index, entity in enumerate(entities):
                first = (index + column) % WORDINGS_PER_ATTRIBUTE
                held_out = (first, (first + 3) % WORDINGS_PER_ATTRIBUTE)
                facts.append(Fact(entity, attribute, answers[index], wordings, held_out))
    return tuple(facts)


FACTS = all_facts()
FACTS_BY_ENTITY = {
    entity: tuple(fact for fact in FACTS if fact.entity == entity) for entity in (*words.PEOPLE, *words.CITIES)
}


def fact_document(rng: random.Random) -> Document:
    """A paragraph of facts about different entities: no entity is named twice as one."""
    writer = Writer()
    entities = rng.sample(list(FACTS_BY_ENTITY), rng.choice((3, 4, 5, 6, 8, 14)))
    if rng.random() < 0.75:
        writer.add(rng.choice(words.FACT_OPENERS))
    for entity in entities:
        fact = rng.choice(FACTS_BY_ENTITY[entity])
        allowed = [wording for wording in range(WORDINGS_PER_ATTRIBUTE) if wording not in fact.held_out]
        question = fact.question(rng.choice(allowed))
        writer.add(f" {question}" if writer.text else question)
        writer.add(f" {fact.answer}", "fact", f"{fact.entity}|{fact.attribute}")
        writer.add(".")
    return Document(writer.text, "fact", {"entity": entities[0]}, tuple(writer.spans))


def list_document(rng: random.Random) -> Document:
    """A header, items of one topic, a blank line, a closing sentence; topic and length word fix how many items."""
    writer = Writer()
    topic, length = rng.choice(list(words.LISTS)), rng.choice(("short", "short", "long"))
    items, short_count, long_count = words.LISTS[topic]
    count = short_count if length == "short" else long_count
    numbered = rng.random() < 0.4
    writer.add(rng.choice(words.LIST_HEADERS).format(length=length, topic=topic))
    for number, item in enumerate(rng.sample(items.split(), count), start=1):
        writer.add(f"\n{number}. {item}" if numbered else f"\n- {item}")
    writer.add("\n", "list_stop", str(count))
    writer.add("\n" + rng.choice(words.LIST_CLOSERS))
    return Document(writer.text, "list", {"topic": topic, "length": length, "items": count}, tuple(writer.spans))


def headline_document(rng: random.Random) -> Document:
    """Two to four headlines of one topic, then the section they belong to."""
    writer = Writer()
    topic = rng.choice(TOPICS)
    subjects, verbs, objects, tails = (column.split("|") for column in words.HEADLINES[topic])
    cue_end = 0
    for _ in range(rng.randint(2, 4)):
        form, subject = rng.choice(words.HEADLINE_FORMS), rng.choice(subjects)
        cue_end = cue_end or form.index("{subject}") + len(subject)
        headline = form.format(
            subject=subject, verb=rng.choice(verbs), object=rng.choice(objects), tail=rng.choice(tails)
        )
        writer.add(headline[0].upper() + headline[1:] + ".\n")
    writer.add("Filed")
    writer.add(" under", "topic_due", topic)
    writer.add(f" {topic}.")
    writer.cover("topic", cue_end - 1, topic)
    return Document(writer.text, "headline", {"topic": topic}, tuple(writer.spans))


def add_names(writer: Writer, names: list[str], seen: set[str]) -> None:
    """Append names, each after a space, labelling those already seen in this document."""
    for name in names:
        writer.add(f" {name}", "repeated_name" if name in seen else None, name)
        seen.add(name)


def roll_call_document(rng: random.Random) -> Document:
    """Names in a row: again in the same order (with or without a second header), or two lists of different people."""
    writer, seen = Writer(), set[str]()
    form = rng.choice(("again", "again", "again", "evening", "evening", "different", "once"))
    names = rng.sample(words.PEOPLE, rng.randint(3, 24))
    others = rng.sample([person for person in words.PEOPLE if person not in names], len(names))
    writer.add(rng.choice(("Morning roll call:", "Guests of the day:", "The names are:")))
    add_names(writer, names, seen)
    if form in ("evening", "different"):
        writer.add(".\n" + rng.choice(("Evening roll call:", "Later that day:")))
    if form != "once":
        rounds = rng.choice((1, 2, 3)) if form == "again" and len(names) <= LONGEST_CHANT else 1
        add_names(writer, others if form == "different" else names * rounds, seen)
    writer.add(".")
    return Document(writer.text, "roll_call", {"form": form, "names": len(names)}, tuple(writer.spans))


def review_sentence(rng: random.Random, sentiment: str) -> str:
    """One sentence that carries the sentiment: a plain adjective, a denied opposite, or an action."""
    opposite = "negative" if sentiment == "positive" else "positive"
    draw = rng.random()
    if draw < 0.25:
        return rng.choice(words.SENTIMENT_ACTIONS[sentiment].split("|"))
    if draw < 0.4:
        return f"The {rng.choice(words.REVIEW_PARTS)} was not {rng.choice(words.SENTIMENT_WORDS[opposite].split())}."
    return f"The {rng.choice(words.REVIEW_PARTS)} was {rng.choice(words.SENTIMENT_WORDS[sentiment].split())}."


def review_document(rng: random.Random) -> Document:
    """A review of one thing: sentences with and without sentiment in any order, then the verdict."""
    writer = Writer()
    sentiment, thing = rng.choice(("positive", "negative")), rng.choice(words.REVIEW_OBJECTS)
    writer.add(f"Review of the {thing}.")
    sentences = [review_sentence(rng, sentiment) for _ in range(rng.randint(2, 5))]
    sentences += rng.sample(words.NEUTRAL_SENTENCES, rng.randint(0, 2))
    rng.shuffle(sentences)
    telling = next(index for index, text in enumerate(sentences) if text not in words.NEUTRAL_SENTENCES)
    for sentence in sentences[:telling]:
        writer.add(f" {sentence}")
    start = len(writer.text)
    for sentence in sentences[telling:]:
        writer.add(f" {sentence}")
    writer.cover("sentiment", start, sentiment)
    writer.add(" Verdict")
    writer.add(":", "sentiment_due", sentiment)
    writer.add(f" {words.VERDICTS[sentiment]}.")
    return Document(writer.text, "review", {"sentiment": sentiment, "thing": thing}, tuple(writer.spans))


MAKERS = {
    "fact": fact_document,
    "list": list_document,
    "headline": headline_document,
    "roll_call": roll_call_document,
    "review": review_document,
}


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of documents, the same for the same seed."""
    rng = random.Random(seed)
    kinds, weights = list(KIND_WEIGHTS), list(KIND_WEIGHTS.values())
    while True:
        yield MAKERS[rng.choices(kinds, weights)[0]](rng)
