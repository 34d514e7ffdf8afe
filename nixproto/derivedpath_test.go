package nixproto

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseDerivedPath(t *testing.T) {
	a, d := string(pathA), string(pathD)
	tests := map[string]struct {
		worker, legacy DerivedPath
	}{
		a:              {DerivedPath{Path: pathA}, DerivedPath{Path: pathA}},
		d:              {DerivedPath{Path: pathD}, DerivedPath{Path: pathD, AllOutputs: true}},
		d + "!*":       {DerivedPath{Path: pathD, AllOutputs: true}, DerivedPath{Path: pathD, AllOutputs: true}},
		d + "!out":     {DerivedPath{Path: pathD, Outputs: []string{"out"}}, DerivedPath{Path: pathD, Outputs: []string{"out"}}},
		d + "!out,dev": {DerivedPath{Path: pathD, Outputs: []string{"out", "dev"}}, DerivedPath{Path: pathD, Outputs: []string{"out", "dev"}}},
	}
	for s, want := range tests {
		got, err := ParseDerivedPath(s)
		if d := cmp.Diff(want.worker, got); err != nil || d != "" {
			t.Errorf("%s: %v\n%s", s, err, d)
		}
		if got.String() != s {
			t.Errorf("%s is written %s", s, got)
		}
		got, err = parseLegacyDerivedPath(s)
		if d := cmp.Diff(want.legacy, got); err != nil || d != "" {
			t.Errorf("%s, legacy: %v\n%s", s, err, d)
		}
	}
	for _, s := range []string{"", "!", "x", "!*", d + "!", d + "!,", d + "!out,", d + "!a/b", d + "!out!dev", d + "!**",
		a + "!out", a + "!*", "/gnu/store/x!out", d + "^out"} {
		if got, err := ParseDerivedPath(s); err == nil {
			t.Errorf("%q is taken as %+v", s, got)
		}
	}
}
