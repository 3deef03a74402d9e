"""Tables for a terminal and for Markdown: text is shown as it is given, also text that looks like a number."""

from cllm4rec.reporting import markdown_table, text_table

HEADER = ["", "recall@20", "n"]
ROWS = [["CLLM4Rec", "0.1 [0.0, 0.2]", "007"], ["EASE", "0.05", ""]]


def test_a_table_for_a_terminal_is_left_aligned_with_a_line_below_the_header():
    assert text_table(HEADER, ROWS).splitlines() == [
        "          recall@20       n",
        "─────────────────────────────",
        "CLLM4Rec  0.1 [0.0, 0.2]  007",
        "EASE      0.05",
    ]


def test_a_markdown_table_is_not_padded():
    lines = markdown_table(HEADER, ROWS).splitlines()
    assert [lines[0], *lines[2:]] == [
        "|  | recall@20 | n |", "| CLLM4Rec | 0.1 [0.0, 0.2] | 007 |", "| EASE | 0.05 |  |"
    ]  # fmt: skip
    assert set(lines[1]) == {"|", "-"}


def test_columns_of_a_markdown_table_can_be_aligned():
    assert markdown_table(["", ""], [["users", "41"]], align=["left", "right"]).splitlines() == [
        "|       |    |", "|:------|---:|", "| users | 41 |"
    ]  # fmt: skip
