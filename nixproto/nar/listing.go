package nar

import (
	"encoding/json"
	"strconv"
	"unicode/utf8"
)

// AppendListing appends the listing of x to b: the JSON of a binary cache's
// "<hash>.ls", version 1, as Nix's listNar writes it. A name or target that is
// not UTF-8 cannot stand in JSON; ok is false then, and b as it was.
func (x Index) AppendListing(b []byte) (listing []byte, ok bool) {
	before := len(b)
	b = append(b, `{"version":1,"root":`...)
	open := 0
	for i := range x {
		e := &x[i]
		if !utf8.ValidString(e.Name) || !utf8.ValidString(e.Target) {
			return b[:before], false
		}
		for ; open > e.Depth; open-- {
			b = append(b, "}}"...)
		}
		if i > 0 {
			if x[i-1].Depth >= e.Depth { // not the first of its directory
				b = append(b, ',')
			}
			b = append(appendJSON(b, e.Name), ':')
		}
		b = appendListed(b, e)
		if e.Kind == Directory {
			open++
		}
	}
	for ; open > 0; open-- {
		b = append(b, "}}"...)
	}
	return append(b, '}'), true
}

// appendListed appends an entry, without the end of a directory.
func appendListed(b []byte, e *Entry) []byte {
	switch e.Kind {
	case Directory:
		return append(b, `{"type":"directory","entries":{`...)
	case Symlink:
		b = append(b, `{"type":"symlink","target":`...)
		b = appendJSON(b, e.Target)
	case Regular:
		b = append(b, `{"type":"regular","size":`...)
		b = strconv.AppendInt(b, e.Size, 10)
		if e.Executable {
			b = append(b, `,"executable":true`...)
		}
		b = append(b, `,"narOffset":`...)
		b = strconv.AppendInt(b, e.Offset, 10)
	}
	return append(b, '}')
}

// appendJSON appends s, which is UTF-8, as a JSON string.
func appendJSON(b []byte, s string) []byte {
	quoted, err := json.Marshal(s)
	if err != nil {
		panic(err) // no string fails
	}
	return append(b, quoted...)
}
