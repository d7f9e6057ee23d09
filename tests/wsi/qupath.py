"""The form of GeoJSON that QuPath 0.4 and later read, as a JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import shapely.geometry

_POSITION = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
# RFC 7946: a ring has at least four positions; that the last equals the first is checked in code.
_RING = {"type": "array", "items": _POSITION, "minItems": 4}
_POLYGON = {"type": "array", "items": _RING, "minItems": 1}

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {"type": "array", "items": {"$ref": "#/$defs/feature"}},
    },
    "$defs": {
        "feature": {
            "type": "object",
            "required": ["type", "id", "geometry", "properties"],
            "properties": {
                "type": {"const": "Feature"},
                "id": {
                    "type": "string",
                    "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
                },
                "geometry": {
                    "type": "object",
                    "required": ["type", "coordinates"],
                    "properties": {"type": {"const": "Polygon"}, "coordinates": _POLYGON},
                    "additionalProperties": False,
                },
                "properties": {
                    "type": "object",
                    "required": ["objectType"],
                    "properties": {
                        "objectType": {"enum": ["annotation", "detection", "tile"]},
                        "name": {"type": "string"},
                        # An object without a colour makes QuPath raise an exception.
                        "classification": {
                            "type": "object",
                            "required": ["name", "color"],
                            "properties": {
                                "name": {"type": "string", "minLength": 1},
                                "color": {
                                    "type": "array",
                                    "items": {"type": "integer", "minimum": 0, "maximum": 255},
                                    "minItems": 3,
                                    "maxItems": 3,
                                },
                            },
                        },
                        "isLocked": {"type": "boolean"},
                        "measurements": {
                            "type": "object",
                            "additionalProperties": {"type": "number"},
                        },
                        "tissue_id": {"type": "integer"},
                    },
                    "additionalProperties": False,
                },
            },
        }
    },
}


def read_valid(path: Path) -> list[dict[str, Any]]:
    """Returns the features of a file after checking schema, closed rings, validity and ids."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path}: {constant} is not JSON")

    value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    jsonschema.Draft202012Validator(SCHEMA).validate(value)
    features: list[dict[str, Any]] = value["features"]
    assert len({feature["id"] for feature in features}) == len(features)
    for feature in features:
        assert all(ring[0] == ring[-1] for ring in feature["geometry"]["coordinates"])
        assert shapely.geometry.shape(feature["geometry"]).is_valid
    return features
