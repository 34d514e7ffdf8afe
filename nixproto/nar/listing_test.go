package nar

import (
	"bytes"
	"encoding/json"
	"testing"
)

func TestListing(t *testing.T) {
	x, _, err := ReadIndex(bytes.NewReader(golden(t, "tree")))
	if err != nil {
		t.Fatal(err)
	}
	got, ok := x.AppendListing(nil)
	const want = `{"version":1,"root":{"type":"directory","entries":{` +
		`"bin":{"type":"directory","entries":{` +
		`"alias":{"type":"symlink","target":"run"},` +
		`"run":{"type":"regular","size":10,"executable":true,"narOffset":592},` +
		`"zero":{"type":"regular","size":0,"executable":true,"narOffset":848}}},` +
		`"lib":{"type":"directory","entries":{"empty":{"type":"directory","entries":{}},` +
		`"zeros":{"type":"regular","size":5000,"narOffset":1376}}},` +
		`"share":{"type":"directory","entries":{"doc":{"type":"directory","entries":{` +
		`"a":{"type":"regular","size":4,"narOffset":6832}}},` +
		`"doc.txt":{"type":"regular","size":4,"narOffset":7056}}},` +
		`"z":{"type":"regular","size":4,"narOffset":7264}}}}`
	if !ok || string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for _, tt := range narTests {
		x, _, err := ReadIndex(bytes.NewReader(golden(t, tt.name)))
		if err != nil {
			t.Fatal(err)
		}
		got, ok := x.AppendListing([]byte("x"))
		if tt.name == "names" { // has names that are not UTF-8
			if ok || string(got) != "x" {
				t.Errorf("%s: %q, %v", tt.name, got, ok)
			}
			continue
		}
		if !ok || !json.Valid(got[1:]) {
			t.Errorf("%s: %q, %v", tt.name, got, ok)
		}
	}
}
