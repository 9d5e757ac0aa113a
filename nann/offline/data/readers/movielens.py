"""MovieLens directories: ml-1m (`ratings.dat`, `movies.dat`) and ml-100k (`u.data`, `u.item`).

Every rating is one behaviour, whatever its stars. A film's category is its first genre.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl

from nann.offline.data.errors import UnsupportedInputError
from nann.offline.data.interactions import BadRows, Interactions
from nann.offline.data.readers.blocks import read_blocks
from nann.offline.data.readers.delimited import LINE, Layout, parse_block
from nann.offline.progress import Progress

__all__ = ["is_movielens_1m", "is_movielens_100k", "read_movielens_1m", "read_movielens_100k"]

RATINGS = Layout(
    names=("user_id", "item_id", "rating", "timestamp"),
    integers=("user_id", "item_id", "timestamp"),
    strings=(),
    required=("user_id", "item_id", "timestamp"),
    separator="\t",
)
# u.item: id | title | release date | video release date | IMDb URL | one 0/1 flag a genre of u.genre
FIRST_GENRE_FLAG = 5


def is_movielens_1m(directory: Path) -> bool:
    """Whether the directory has ml-1m's ratings."""
    return (directory / "ratings.dat").is_file()


def is_movielens_100k(directory: Path) -> bool:
    """Whether the directory has ml-100k's ratings."""
    return (directory / "u.data").is_file()


def read_movielens_1m(directory: Path, bad_rows: BadRows, progress: Progress) -> Interactions:
    """Read `ratings.dat` and, for titles, years and genres, `movies.dat` (latin-1, `::` separated)."""
    ratings = _read_ratings(directory / "ratings.dat", "::", bad_rows, progress)
    movies = directory / "movies.dat"
    attributes = None
    if movies.is_file():
        rows = _split_lines(movies, "::", 3, bad_rows)
        genres = rows["2"].str.split("|").list.eval(pl.element().filter(pl.element() != ""))
        attributes = _film_attributes(rows["0"], rows["1"], genres)
    return _interactions("MovieLens-1M", (directory / "ratings.dat", movies), ratings, attributes)


def read_movielens_100k(directory: Path, bad_rows: BadRows, progress: Progress) -> Interactions:
    """Read `u.data` and, for titles, years and genres, `u.item` with `u.genre` (latin-1)."""
    ratings = _read_ratings(directory / "u.data", "\t", bad_rows, progress)
    films, genre_file = directory / "u.item", directory / "u.genre"
    attributes = None
    if films.is_file():
        if not genre_file.is_file():
            raise UnsupportedInputError(f"{films} needs {genre_file.name} beside it, which names the genres")
        names = _split_lines(genre_file, "|", 2, bad_rows)["0"].to_list()
        rows = _split_lines(films, "|", FIRST_GENRE_FLAG + len(names), bad_rows)
        flags = [
            pl.when(pl.col(str(FIRST_GENRE_FLAG + i)) == "1").then(pl.lit(name))
            for i, name in enumerate(names)
        ]
        genres = rows.select(genres=pl.concat_list(flags).list.drop_nulls()).to_series()
        attributes = _film_attributes(rows["0"], rows["1"], genres)
    return _interactions("MovieLens-100K", (directory / "u.data", films), ratings, attributes)


def _read_ratings(path: Path, separator: str, bad_rows: BadRows, progress: Progress) -> pl.DataFrame:
    parts: list[pl.DataFrame] = []
    for block in read_blocks(path, progress):
        # The parser takes one-byte separators only.
        tabbed = replace(block, data=block.data.replace(separator.encode(), b"\t"))
        parts.append(parse_block(tabbed, RATINGS, bad_rows))
    return pl.concat(parts) if parts else pl.DataFrame(schema=dict.fromkeys(RATINGS.read, pl.Int64))


def _split_lines(path: Path, separator: str, n_fields: int, bad_rows: BadRows) -> pl.DataFrame:
    """A small latin-1 file as string columns "0", "1" …; lines with too few fields are bad rows."""
    # Not splitlines: in latin-1 it would also split at 0x85, an ellipsis in these files' real encoding.
    text = pl.Series("text", path.read_text(encoding="latin-1").split("\n"), dtype=pl.String)
    lines = text.to_frame().with_row_index(LINE, offset=1).filter(pl.col("text").str.strip_chars() != "")
    fields = lines["text"].str.split(separator)
    good = fields.list.len() == n_fields
    bad = lines.filter(~good)
    if bad.height:
        bad_rows.add(path.name, bad[LINE], f"not {n_fields} fields", bad["text"])
    columns = fields.filter(good).list.to_struct(fields=[str(i) for i in range(n_fields)])
    return columns.struct.unnest()


def _film_attributes(ids: pl.Series, titles: pl.Series, genres: pl.Series) -> pl.DataFrame:
    """Titles as the files give them, `Toy Story (1995)`; the year in brackets also as a number."""
    columns = pl.DataFrame({"id": ids, "title": titles, "genres": genres})
    return columns.select(
        item_id=pl.col("id").cast(pl.Int64, strict=False),
        title=pl.col("title"),
        category=pl.col("genres").list.first(),
        year=pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int64),
        genres=pl.col("genres"),
    ).drop_nulls("item_id")


def _interactions(
    name: str, paths: tuple[Path, ...], ratings: pl.DataFrame, attributes: pl.DataFrame | None
) -> Interactions:
    return Interactions(
        format=name,
        files=tuple(path.name for path in paths if path.is_file()),
        users=ratings["user_id"],
        items=ratings["item_id"],
        timestamps=ratings["timestamp"],
        item_attributes=attributes,
    )
