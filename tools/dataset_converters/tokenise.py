"""Conversations to tokens: `xtuner-add tokenise` for those who run scripts."""

from xtuner_add.tokenise_command import tokenise

if __name__ == "__main__":
    tokenise()
