"""Facts noted in German, French, Italian and Portuguese prose, and asked in the same language.

The prose is Debian's list of questions and answers (packages debian-faq-de and so on, GPL-2 or later), as ``fetch``
left it in a folder of texts.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from keepkv.tasks.base import Count, Item, Question, weave
from keepkv.tasks.notes import PEOPLE, PRICES

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-ZÄÖÜÀÂÉÈÊÎÔÁÍÓÚÇ])")
_PROSE = re.compile(r"[A-ZÄÖÜÀÂÉÈÊÎÔÁÍÓÚÇ][^\W\d_][\w ,;:'’()/\-]{20,280}\w\.")


@dataclass(frozen=True)
class Language:
    """kinds: what is noted, what is asked, and the words that the answer may be; ``{}`` is a
    person, then the answer."""

    code: str
    introduction: str
    question: str
    hint: str
    answer: str
    kinds: tuple[tuple[str, str, str], ...]


LANGUAGES = (
    Language(
        "de",
        "Lies den folgenden Text.\n\n",
        "Frage",
        "Antworte mit einem Wort.",
        "Antwort",
        (
            (
                " Die Eltern von {} wohnen in {}.",
                "In welcher Stadt wohnen die Eltern von {}?",
                "Lissabon Wien Oslo Madrid Berlin Warschau",
            ),
            (
                " Die Lieblingsfarbe von {} ist {}.",
                "Was ist die Lieblingsfarbe von {}?",
                "rot blau braun gelb schwarz weiß",
            ),
            (" Das Fahrrad von {} kostet {} Euro.", "Wie viele Euro kostet das Fahrrad von {}?", " ".join(PRICES)),
            (" Der Hund von {} heißt {}.", "Wie heißt der Hund von {}?", "Rex Luna Max Bella Oscar Coco"),
            (
                " Der Schlüssel von {} liegt im {}.",
                "Wo liegt der Schlüssel von {}?",
                "Garten Keller Schrank Auto Schuppen Flur",
            ),
            (
                " {} trifft den Arzt am {}.",
                "An welchem Tag trifft {} den Arzt?",
                "Montag Dienstag Donnerstag Freitag Samstag Sonntag",
            ),
        ),
    ),
    Language(
        "fr",
        "Lis le texte suivant.\n\n",
        "Question",
        "Réponds en un mot.",
        "Réponse",
        (
            (
                " Les parents de {} habitent à {}.",
                "Dans quelle ville habitent les parents de {} ?",
                "Lisbonne Vienne Oslo Madrid Berlin Varsovie",
            ),
            (
                " La couleur préférée de {} est le {}.",
                "Quelle est la couleur préférée de {} ?",
                "rouge bleu vert jaune noir blanc",
            ),
            (" Le vélo de {} coûte {} euros.", "Combien d'euros coûte le vélo de {} ?", " ".join(PRICES)),
            (" Le chien de {} s'appelle {}.", "Comment s'appelle le chien de {} ?", "Rex Luna Max Bella Oscar Coco"),
            (" La clé de {} est dans le {}.", "Où est la clé de {} ?", "jardin garage placard salon tiroir bureau"),
            (
                " {} voit le médecin {}.",
                "Quel jour {} voit-il le médecin ?",
                "lundi mardi jeudi vendredi samedi dimanche",
            ),
        ),
    ),
    Language(
        "it",
        "Leggi il testo seguente.\n\n",
        "Domanda",
        "Rispondi con una parola.",
        "Risposta",
        (
            (
                " I genitori di {} abitano a {}.",
                "In quale città abitano i genitori di {}?",
                "Lisbona Vienna Oslo Madrid Berlino Varsavia",
            ),
            (
                " Il colore preferito di {} è il {}.",
                "Qual è il colore preferito di {}?",
                "rosso blu verde giallo nero bianco",
            ),
            (" La bicicletta di {} costa {} euro.", "Quanti euro costa la bicicletta di {}?", " ".join(PRICES)),
            (" Il cane di {} si chiama {}.", "Come si chiama il cane di {}?", "Rex Luna Max Bella Oscar Coco"),
            (" La chiave di {} è nel {}.", "Dov'è la chiave di {}?", "giardino garage cassetto salotto bagno cortile"),
            (
                " {} vede il medico {}.",
                "In quale giorno {} vede il medico?",
                "lunedì martedì giovedì venerdì sabato domenica",
            ),
        ),
    ),
    Language(
        "pt",
        "Leia o texto seguinte.\n\n",
        "Pergunta",
        "Responda com uma palavra.",
        "Resposta",
        (
            (
                " Os pais de {} moram em {}.",
                "Em que cidade moram os pais de {}?",
                "Lisboa Viena Oslo Madrid Berlim Varsóvia",
            ),
            (" A cor favorita de {} é {}.", "Qual é a cor favorita de {}?", "vermelho azul verde amarelo preto branco"),
            (" A bicicleta de {} custa {} euros.", "Quantos euros custa a bicicleta de {}?", " ".join(PRICES)),
            (" O cão de {} chama-se {}.", "Como se chama o cão de {}?", "Rex Luna Max Bella Oscar Coco"),
            (
                " A chave de {} está no {}.",
                "Onde está a chave de {}?",
                "jardim armário carro sótão banheiro escritório",
            ),
            (" {} vai ao médico no {}.", "Em que dia {} vai ao médico?", "sábado domingo"),
        ),
    ),
)


@lru_cache(maxsize=len(LANGUAGES))
def prose(file: Path) -> tuple[str, ...]:
    """Plain sentences of a text, in order; the first of a paragraph starts with a newline, the others with a space."""
    if not file.exists():
        raise SystemExit(f"no text {file}: make real-models writes it, where apt-get is")
    found = []
    for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
        lead = "\n"
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            if _PROSE.fullmatch(sentence):
                found.append(lead + sentence)
                lead = " "
    return tuple(found)


def languages(rng: random.Random, count: Count, length: int, number: int, texts: Path) -> Item:
    """Context ``number`` in one of the languages, in turn: a fact of each kind, about different people, all asked."""
    told = LANGUAGES[number % len(LANGUAGES)]
    people = rng.sample(PEOPLE, len(told.kinds))
    facts, asked = [], []
    for person, (said, question, answers) in zip(people, rng.sample(told.kinds, len(told.kinds)), strict=True):
        known = rng.choice(answers.split())
        facts.append(said.format(person, known))
        prompt = f"\n\n{told.question}: {question.format(person)} {told.hint}\n{told.answer}:"
        asked.append(Question(prompt, f" {known}", values=(known,)))
    haystack = prose(texts / f"debian-faq.{told.code}.txt")
    return Item(told.introduction + weave(rng, count, length, facts, haystack=haystack), tuple(asked))
