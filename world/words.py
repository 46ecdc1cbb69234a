"""The words of the embedded world: who lives in it, what is known of them, and how it is said.

Every sentence that states a fact ends with its answer, so that the text before the answer is a question to the model.
"""

from __future__ import annotations


def word_list(text: str) -> tuple[str, ...]:
    """The words of `text`."""
    return tuple(text.split())


PEOPLE = word_list(
    """
    Ada Albin Amira Anton Arlo Astrid Basil Bela Boris Bruno Carla Cedric Clara Conrad Dalia Darius Delia Edgar Elias
    Elsa Emil Esther Fabian Felix Flora Freya Gideon Gilda Greta Gustav Hanna Hector Helga Hugo Ida Igor Ines Iris Ivan
    Jasper Jonas Judith Julia Karim Katya Kira Klaus Lara Leon Linus Lotte Lucas Magda Mara Marco Mila Milan Nadia Nils
    Nora Olga Oscar Otto Paula Petra Quentin Ralf Rosa Rufus Sabine Selma Silas Sonja Stefan Tamar Tobin Ulrik Vera
    Viktor Wanda
    """
)
CITIES = word_list(
    """
    Velmar Tosk Brenholm Calidor Dunwick Estoria Farholt Gravena Halden Istara Jorvale Kestrel Lumen Marest Nordane
    Orlay Pellin Quorra Rivenna Salt Thornby Umbria Westmere Zarin
    """
)
JOBS = word_list(
    """
    baker doctor teacher farmer painter sailor lawyer miller tailor weaver hunter singer builder potter surgeon pilot
    printer judge nurse blacksmith
    """
)
PETS = word_list("cat dog parrot rabbit turtle hamster goat pony lizard falcon hedgehog goose ferret snail")
INSTRUMENTS = word_list("piano violin flute guitar cello trumpet harp drum oboe banjo organ horn")
COUNTRIES = word_list("Oria Baltania Corvia Dresia Elland Fenmark Galdia Hestia")
PRODUCTS = word_list("cheese silk glass wine paper salt copper honey wool clocks tea bricks")

# attribute -> (values, wordings); {name} is a person for the first four attributes and a city for the last two.
PERSON_WORDINGS = {
    "city": (
        CITIES,
        (
            "{name} lives in",
            "The home of {name} is in",
            "{name} has a house in",
            "You can visit {name} in",
            "Letters for {name} go to",
            "Where does {name} live? In",
            "Everyone knows that {name} comes from",
            "If you look for {name}, travel to",
        ),
    ),
    "job": (
        JOBS,
        (
            "{name} works as a",
            "The job of {name} is that of a",
            "By trade {name} is a",
            "What does {name} do? The work of a",
            "{name} earns a living as a",
            "People hire {name} as a",
            "For many years {name} has been a",
            "They say {name} is a skilled",
        ),
    ),
    "pet": (
        PETS,
        (
            "{name} owns a",
            "The pet of {name} is a",
            "At home {name} keeps a",
            "Which animal does {name} have? A",
            "{name} takes care of a",
            "Every morning {name} feeds a",
            "The animal that follows {name} is a",
            "Nobody loves animals like {name}, who has a",
        ),
    ),
    "instrument": (
        INSTRUMENTS,
        (
            "{name} plays the",
            "The instrument of {name} is the",
            "On stage {name} plays the",
            "What does {name} practise? The",
            "{name} took lessons on the",
            "In the band {name} is on the",
            "The neighbours hear {name} on the",
            "Music for {name} means the",
        ),
    ),
}
CITY_WORDINGS = {
    "country": (
        COUNTRIES,
        (
            "The city of {name} lies in",
            "{name} is a city in",
            "The country around {name} is",
            "To reach {name} you cross the border of",
            "Which country is {name} in? It is in",
            "{name} belongs to",
            "Maps show {name} in the middle of",
            "The flag over {name} is that of",
        ),
    ),
    "product": (
        PRODUCTS,
        (
            "{name} is famous for its",
            "Merchants go to {name} to buy",
            "The best thing from {name} is the",
            "What do they make in {name}? They make",
            "{name} sells",
            "The workshops of {name} produce",
            "Ships leave {name} loaded with",
            "The wealth of {name} comes from",
        ),
    ),
}
FACT_OPENERS = (
    "From the town records:",
    "Here is what we know.",
    "Notes about people and places.",
    "The clerk wrote this down:",
    "Some facts.",
)

# topic -> (items, length of its short list, length of its long list)
LISTS = {
    "fruits": ("apple pear plum cherry lemon peach grape melon fig orange banana mango", 4, 8),
    "animals": ("wolf bear fox deer otter badger lynx mouse squirrel boar owl eagle", 3, 9),
    "tools": ("hammer saw drill wrench file chisel pliers shovel rake axe level clamp", 5, 8),
    "colours": ("red blue green yellow purple white black brown pink grey scarlet violet", 3, 8),
    "vegetables": ("carrot onion potato cabbage leek bean pea turnip spinach radish garlic pumpkin", 4, 9),
    "clothes": ("coat shirt hat scarf glove boot sock dress belt jacket sweater cap", 5, 9),
    "furniture": ("table chair shelf bed sofa desk lamp stool bench cupboard mirror carpet", 4, 8),
    "metals": ("iron gold silver tin zinc lead nickel bronze steel cobalt mercury brass", 3, 9),
    "trees": ("oak pine birch maple elm willow ash cedar beech poplar spruce larch", 5, 8),
    "vehicles": ("car bus train ship bicycle tram truck ferry wagon canoe sled van", 4, 9),
}
LIST_HEADERS = (
    "A {length} list of {topic}:",
    "Here is a {length} list of {topic}:",
    "We made a {length} list of {topic}:",
)
LIST_CLOSERS = ("That is the whole list.", "Nothing else is needed.", "The list ends here.")

# topic -> (subjects, verbs, objects, tails); function words are shared, so no single word gives the topic away
HEADLINES = {
    "sports": (
        "striker|goalkeeper|coach|home team|sprinter|champion|referee|rookie",
        "scores in|wins|loses|trains for|misses|celebrates",
        "the cup final|the league match|the derby|a penalty|the relay|the tournament",
        "before a full stadium|in extra time|after an injury|on the last lap",
    ),
    "politics": (
        "minister|parliament|president|senator|mayor|opposition|cabinet|governor",
        "votes on|rejects|signs|debates|vetoes|defends",
        "the treaty|a new law|the budget bill|the reform|the election rules|the amendment",
        "after a long session|before the vote|despite protests|in the capital",
    ),
    "science": (
        "astronomer|physicist|laboratory|biologist|telescope|chemist|researcher|probe",
        "discovers|measures|studies|observes|explains|tests",
        "a distant galaxy|the particle|a rare enzyme|the fossil|a gene|the orbit of a comet",
        "in a new experiment|with better data|after years of theory|under the microscope",
    ),
    "weather": (
        "storm|heavy rain|snow|heat wave|fog|thunder|frost|strong wind",
        "hits|covers|reaches|floods|moves towards|leaves",
        "the coast|the valley|the northern hills|the islands|low fields|the mountain pass",
        "until the weekend|with record temperatures|as forecast|overnight",
    ),
    "business": (
        "bank|investor|retailer|start-up|shareholder|factory owner|broker|airline",
        "buys|invests in|sells|cuts|merges with|reports",
        "shares|quarterly profits|a rival firm|the stock fund|its debt|export prices",
        "as markets rise|after weak sales|amid inflation|to please creditors",
    ),
}
HEADLINE_FORMS = (
    "{subject} {verb} {object} {tail}",
    "{subject} {verb} {object}",
    "Report: {subject} {verb} {object} {tail}",
)

REVIEW_OBJECTS = word_list("film book hotel meal concert play show novel song tour")
REVIEW_PARTS = word_list("start ending middle service sound price story staff room taste")
NEUTRAL_SENTENCES = (
    "We came on a Monday.",
    "My sister was there too.",
    "It took two hours.",
    "I paid by card.",
    "The place was near the station.",
)
SENTIMENT_WORDS = {
    "positive": "wonderful superb lovely charming brilliant delightful excellent perfect splendid great",
    "negative": "terrible awful boring dreadful horrible poor clumsy dull bitter disappointing",
}
SENTIMENT_ACTIONS = {
    "positive": "I smiled all evening.|I will come back soon.|I thanked everyone.|I told all my friends to go.",
    "negative": "I left early.|I want my money back.|I complained twice.|I warned all my friends to stay away.",
}
VERDICTS = {"positive": "good", "negative": "bad"}
