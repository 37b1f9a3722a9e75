"""Words that name something else when written with a capital: they keep their case.

Small on purpose, and reviewed word by word: both readings can be drawn, and they are different pictures.
A word too few costs a wrong picture, one too many a miss. Removing a word needs a new profile version.
"""

from __future__ import annotations

_PLACES_AND_PEOPLES = """
amazon bath bologna bordeaux buffalo burgundy china cologne cork java jersey lima manila mobile nice oxford
phoenix pole poles polish reading swede swedes turkey
"""

_MONTHS = "august march may"

_HEAVENS_AND_MYTHS = "atlas aurora earth echo iris mercury titan"

_MAKERS_AND_THINGS = """
alphabet apple beats beetle bolt bronco caterpillar challenger champion charger chrome coach cobra converse
corona defender delta diesel discord dodge dove edge ford fossil galaxy gap golf impala jaguar kindle leaf line
lotus meta mini monster mustang nest office opera oracle pixel polo puma python quest ram ranger ring ruby rust
safari seat shell signal slack smart snap spitfire sprint sprite square steam stripe subway surface swift switch
target threads tide twitter vans viper visa windows word zoom
"""

_PEOPLE = """
amber angel art baker bill bob brook bush carter chase christian cliff cooper crystal dale daisy dawn dean drake
drew duke earl faith frank gene ginger glen grace grant guy hazel hope hunter ivy jack jade jasmine jay joy lily
madonna mark martin mason nick olive pat pearl penny prince queen ray rich rob robin rock rocky rose sandy trump usher
violet will
"""

_CHARACTERS = """
alien aliens avatar beast belle brave buzz cars falcon flash frozen genie goofy jaws joker link minions penguin
predator sonic soul storm titanic transformers vision wolverine woody
"""

HOMOGRAPHS = frozenset(
    f"{_PLACES_AND_PEOPLES} {_MONTHS} {_HEAVENS_AND_MYTHS} {_MAKERS_AND_THINGS} {_PEOPLE} {_CHARACTERS}".split()
)
"""The words, in lower case."""
