package nixproto

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestRealisationJSONGolden(t *testing.T) {
	k, p := goldenKeys(t)
	for _, line := range goldenRealisations(t) {
		r, err := ParseRealisation(line)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.JSON(); string(got) != string(line) {
			t.Errorf("got  %s\nwant %s", got, line)
		}
		if keys, err := r.CheckSignatures([]PublicKey{p}); err != nil || len(keys) != 1 {
			t.Errorf("%s: signed by %v, %v", r.ID(), keys, err)
		}
		sigs := r.Signatures
		r.Signatures = nil
		r.Sign(k)
		if !cmp.Equal(sigs, r.Signatures) {
			t.Errorf("%s: signature %v, want %v", r.ID(), r.Signatures, sigs)
		}
		r.OutPath += "x"
		if _, err := r.CheckSignatures([]PublicKey{p}); !errors.Is(err, ErrBadSignature) {
			t.Errorf("changed: %v", err)
		}
	}
}

const (
	sampleID   = "sha256:a28e6d9991e772354ee183d77c0480fc8a4e420435c2f19b0596080bcae30609!out"
	samplePath = "mc3sc53msjw36nlw3qbv9zswbsmj1my6-floating"
)

func TestParseRealisation(t *testing.T) {
	min := `{"id":"` + sampleID + `","outPath":"` + samplePath + `"}`
	r, err := ParseRealisation([]byte(min))
	if err != nil {
		t.Fatal(err)
	}
	if r.ID() != sampleID || r.OutPath.Base() != samplePath || r.Signatures != nil || r.Dependent != nil {
		t.Errorf("%+v", r)
	}
	want := `{"dependentRealisations":{},"id":"` + sampleID + `","outPath":"` + samplePath + `","signatures":[]}`
	if got := string(r.JSON()); got != want {
		t.Errorf("%s", got)
	}
	r.Dependent = map[string]string{sampleID: samplePath}
	r.Signatures = []string{"<a>:&"}
	want = `{"dependentRealisations":{"` + sampleID + `":"` + samplePath + `"},"id":"` + sampleID + `","outPath":"` + samplePath + `","signatures":["<a>:&"]}`
	if got := string(r.JSON()); got != want {
		t.Errorf("%s", got)
	}
	for _, s := range []string{
		"", "{}", "null", "[]", min + "x", `{"id":"` + sampleID + `"}`, `{"outPath":"` + samplePath + `"}`,
		`{"id":"x","outPath":"` + samplePath + `"}`, `{"id":"` + sampleID + `","outPath":"/nix/store/` + samplePath + `"}`,
		`{"id":"` + sampleID[7:] + `","outPath":"` + samplePath + `"}`,
		`{"id":"` + sampleID + `/","outPath":"` + samplePath + `"}`,
		`{"id":"` + sampleID + `","outPath":"` + samplePath + `","signatures":[1]}`,
		`{"dependentRealisations":{"x":"` + samplePath + `"},"id":"` + sampleID + `","outPath":"` + samplePath + `"}`,
		`{"dependentRealisations":{"` + sampleID + `":"x"},"id":"` + sampleID + `","outPath":"` + samplePath + `"}`,
	} {
		if r, err := ParseRealisation([]byte(s)); err == nil {
			t.Errorf("%s: %+v", s, r)
		}
	}
}

func FuzzParseRealisation(f *testing.F) {
	for _, line := range goldenRealisations(f) {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRealisation(b)
		if err != nil {
			return
		}
		again, err := ParseRealisation(r.JSON())
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(r, again, cmpopts.EquateComparable(Hash{})); d != "" {
			t.Error(d)
		}
	})
}
