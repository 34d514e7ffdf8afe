package nar

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestListing(t *testing.T) {
	x, _, err := ReadIndex(bytes.NewReader(golden(t, "tree")))
	if err != nil {
		t.Fatal(err)
	}
	got, ok := x.AppendListing(nil)
	root, err := os.ReadFile(filepath.Join("..", "..", "testdata", "nar", "tree.ls"))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"version":1,"root":` + strings.TrimSpace(string(root)) + "}"
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
