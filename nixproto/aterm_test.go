package nixproto

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	atermPath = StoreDir + "/00000000000000000000000000000000-x"
	atermDrv  = atermPath + ".drv"
)

// aterm puts fields into the text of a derivation.
func aterm(outputs, drvs, srcs, args, env string) string {
	return "Derive([" + outputs + "],[" + drvs + "],[" + srcs + `],"sys","/b",[` + args + "],[" + env + "])"
}

func TestParseDerivation(t *testing.T) {
	text := aterm(`("dev","","r:sha256",""),("out","","r:sha256","")`,
		`("`+atermDrv+`",[]),("`+strings.Replace(atermDrv, "0", "1", 1)+`",["a","b"])`,
		`"`+atermPath+`"`, `"","b","\"\\\n\r\t$`+"\x00\xff"+`"`, `("",""),("a","b")`)
	d, err := ParseDerivation("n", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := &Derivation{
		Name:      "n",
		Outputs:   map[string]DerivationOutput{"dev": {HashAlgo: "r:sha256"}, "out": {HashAlgo: "r:sha256"}},
		InputDrvs: map[StorePath][]string{atermDrv: {}, StorePath(strings.Replace(atermDrv, "0", "1", 1)): {"a", "b"}},
		InputSrcs: []StorePath{atermPath},
		System:    "sys", Builder: "/b", Args: []string{"", "b", "\"\\\n\r\t$\x00\xff"},
		Env: map[string]string{"": "", "a": "b"},
	}
	if diff := cmp.Diff(want, d); diff != "" {
		t.Error(diff)
	}
}

func TestParseDerivationMalformed(t *testing.T) {
	out := `("out","` + atermPath + `","","")`
	ok := aterm(out, "", "", "", "")
	for name, text := range map[string]string{
		"empty":                "",
		"dynamic":              `DrvWithVersion("xp-dyn-drv",` + strings.TrimPrefix(ok, "Derive("),
		"after the end":        ok + "\n",
		"white space":          strings.Replace(ok, ",", ", ", 1),
		"not a path":           aterm(`("out","x","","")`, "", "", "", ""),
		"other store":          aterm(`("out","/gnu/store/00000000000000000000000000000000-x","","")`, "", "", "", ""),
		"output's name":        aterm(`("a/b","","","")`, "", "", "", ""),
		"output twice":         aterm(out+","+out, "", "", "", ""),
		"outputs unsorted":     aterm(out+`,("dev","","","")`, "", "", "", ""),
		"three fields":         aterm(`("out","","")`, "", "", "", ""),
		"five fields":          aterm(`("out","","","","")`, "", "", "", ""),
		"input is no drv":      aterm(out, `("`+atermPath+`",["out"])`, "", "", ""),
		"input twice":          aterm(out, `("`+atermDrv+`",["a"]),("`+atermDrv+`",["b"])`, "", "", ""),
		"input's outputs":      aterm(out, `("`+atermDrv+`",["b","a"])`, "", "", ""),
		"input's output twice": aterm(out, `("`+atermDrv+`",["a","a"])`, "", "", ""),
		"nested input":         aterm(out, `("`+atermDrv+`",(["a"],[("out",["b"])]))`, "", "", ""),
		"source twice":         aterm(out, "", `"`+atermPath+`","`+atermPath+`"`, "", ""),
		"source is no path":    aterm(out, "", `"`+atermPath+`/x"`, "", ""),
		"key twice":            aterm(out, "", "", "", `("a","1"),("a","2")`),
		"keys unsorted":        aterm(out, "", "", "", `("b",""),("a","")`),
		"unknown escape":       aterm(out, "", "", `"\x"`, ""),
		"newline as it is":     aterm(out, "", "", "\"\n\"", ""),
		"tab as it is":         aterm(out, "", "", "\"\t\"", ""),
		"escape at the end":    aterm(out, "", "", "", "")[:20] + `\`,
		"comma at the end":     aterm(out+",", "", "", "", ""),
		"comma at the front":   aterm(","+out, "", "", "", ""),
		"endless list":         "Derive([" + strings.Repeat("(", 1<<16),
		"endless lists":        "Derive(" + strings.Repeat("[", 1<<16),
	} {
		if d, err := ParseDerivation("n", []byte(text)); !errors.Is(err, ErrInvalidDerivation) {
			t.Errorf("%s: %v, %v", name, d, err)
		}
	}
	for n := range ok {
		if _, err := ParseDerivation("n", []byte(ok[:n])); err == nil {
			t.Errorf("first %d bytes are taken", n)
		}
	}
	if _, err := ParseDerivation("a/b", []byte(ok)); err == nil {
		t.Error("bad name is taken")
	}
	if _, err := ParseDerivation("n", make([]byte, MaxMessage+1)); err == nil {
		t.Error("long text is taken")
	}
}

// FuzzParseDerivation wants every text that is taken to be printed again.
func FuzzParseDerivation(f *testing.F) {
	for _, text := range goldenDrvs(f) {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := ParseDerivation("n", text)
		if err != nil {
			return
		}
		if got := d.ATerm(); !bytes.Equal(got, text) {
			t.Errorf("printed %q\nwant %q", got, text)
		}
		if _, err := d.DrvPath(); err != nil {
			t.Error(err)
		}
		if kind, err := d.Kind(); err == nil && len(d.InputDrvs) == 0 {
			if _, ok, err := NewModulo(nil).OutputPaths(d); err == nil && ok != (kind != Floating && kind != Impure) {
				t.Errorf("%v: output paths %v", kind, ok)
			}
		}
	})
}
