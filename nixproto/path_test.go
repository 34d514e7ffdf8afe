package nixproto

import (
	"errors"
	"strings"
	"testing"
)

const zeroPart = "00000000000000000000000000000000"

func TestParseStorePath(t *testing.T) {
	p, err := ParseStorePath(StoreDir + "/" + zeroPart + "-a.drv")
	if err != nil {
		t.Fatal(err)
	}
	if p.Base() != zeroPart+"-a.drv" || p.HashPart() != zeroPart || p.Name() != "a.drv" || !p.IsDerivation() {
		t.Errorf("%q %q %q %v", p.Base(), p.HashPart(), p.Name(), p.IsDerivation())
	}
	for _, name := range []string{"a", "+-._?=", "...", ".a", "..a", "a-", strings.Repeat("x", MaxNameLen)} {
		if _, err := ParseStorePath(StoreDir + "/" + zeroPart + "-" + name); err != nil {
			t.Error(err)
		}
	}
	for _, s := range []string{
		"", "x", StoreDir, StoreDir + "/", StoreDir + "/" + zeroPart, StoreDir + "/" + zeroPart + "-",
		StoreDir + "/" + zeroPart + "x", StoreDir + "/" + zeroPart + "/a", StoreDir + "//" + zeroPart + "-a",
		StoreDir + "x" + zeroPart + "-a", StoreDir + "/" + zeroPart[1:] + "-aa", StoreDir + "/" + zeroPart + "-a/b",
		StoreDir + "/" + zeroPart + "-.", StoreDir + "/" + zeroPart + "-..", StoreDir + "/" + zeroPart + "-.-a",
		StoreDir + "/" + zeroPart + "-..-a", StoreDir + "/" + zeroPart + "-a b", StoreDir + "/" + zeroPart + "-ä",
		StoreDir + "/" + zeroPart + "-a\x00", StoreDir + "/" + zeroPart + "-a\n",
		StoreDir + "/e" + zeroPart[1:] + "-a", StoreDir + "/A" + zeroPart[1:] + "-a",
		StoreDir + "/" + zeroPart + "-" + strings.Repeat("x", MaxNameLen+1),
	} {
		if p, err := ParseStorePath(s); err == nil {
			t.Errorf("%q is taken: %q", s, p)
		}
	}
	if _, err := ParseStorePath("/gnu/store/" + zeroPart + "-a"); !errors.Is(err, ErrOtherStore) {
		t.Errorf("%v", err)
	}
}

func FuzzParseStorePath(f *testing.F) {
	for p := range goldenDrvs(f) {
		f.Add(string(p))
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseStorePath(s)
		if err != nil {
			return
		}
		if string(p) != s || StoreDir+"/"+p.HashPart()+"-"+p.Name() != s {
			t.Errorf("%q became %q", s, p)
		}
		if again, err := ParseBaseName(p.Base()); err != nil || again != p {
			t.Errorf("%q: base name %q, %v", s, again, err)
		}
	})
}
