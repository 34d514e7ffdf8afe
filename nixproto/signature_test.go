package nixproto

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func goldenKeys(t testing.TB) (SigningKey, PublicKey) {
	t.Helper()
	k, err := ParseSigningKey(string(readGolden(t, "key.secret")))
	if err != nil {
		t.Fatal(err)
	}
	p, err := ParsePublicKey(string(readGolden(t, "key.public")))
	if err != nil {
		t.Fatal(err)
	}
	return k, p
}

func TestSignaturesGolden(t *testing.T) {
	k, p := goldenKeys(t)
	if k.Public() != p || p.String() != string(readGolden(t, "key.public")) {
		t.Errorf("public key %s", p)
	}
	if k.Secret() != string(readGolden(t, "key.secret")) {
		t.Error("secret key is written in another way")
	}
	other, err := GenerateSigningKey(k.Name, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signed := 0
	for _, info := range goldenInfos(t) {
		for _, sig := range info.Signatures {
			signed++
			if got := k.Sign(info.Fingerprint()); got != sig {
				t.Errorf("%s: signature %s, want %s", info.Path, got, sig)
			}
			if !p.Verify(info.Fingerprint(), sig) || other.Public().Verify(info.Fingerprint(), sig) {
				t.Errorf("%s: Verify", info.Path)
			}
		}
		before := len(info.Signatures)
		info.Sign(k)
		if len(info.Signatures) != max(before, 1) {
			t.Errorf("%s: signed twice", info.Path)
		}
		keys, err := info.CheckSignatures([]PublicKey{other.Public(), p})
		if err != nil || len(keys) != 1 || keys[0] != p {
			t.Errorf("%s: signed by %v, %v", info.Path, keys, err)
		}
		info.NarSize++
		if _, err := info.CheckSignatures([]PublicKey{p}); !errors.Is(err, ErrBadSignature) {
			t.Errorf("%s: changed: %v", info.Path, err)
		}
		if keys, err := info.CheckSignatures(nil); err != nil || len(keys) > 0 {
			t.Errorf("%s: no keys: %v, %v", info.Path, keys, err)
		}
	}
	if signed == 0 {
		t.Error("nothing is signed")
	}
}

func TestFingerprint(t *testing.T) {
	p := &PathInfo{Path: "/nix/store/b-x", NarHash: SumSHA256(nil), NarSize: 7}
	const begin = "1;/nix/store/b-x;sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73;7;"
	if got := p.Fingerprint(); got != begin {
		t.Errorf("%s", got)
	}
	p.References = []StorePath{"/nix/store/c-x", "/nix/store/a-x"}
	if got := p.Fingerprint(); got != begin+"/nix/store/a-x,/nix/store/c-x" {
		t.Errorf("%s", got)
	}
}

func TestParseKeyMalformed(t *testing.T) {
	k, p := goldenKeys(t)
	swapped := []byte(k.Secret())
	swapped[len(swapped)-10]++
	for _, s := range []string{
		"", ":", "x", "x:", k.Name, p.String(), k.Secret() + "\n", " " + k.Secret(), k.Secret()[:len(k.Secret())-4],
		strings.TrimPrefix(k.Secret(), k.Name), "a b" + strings.TrimPrefix(k.Secret(), k.Name), string(swapped),
	} {
		if _, err := ParseSigningKey(s); err == nil {
			t.Errorf("secret key %q is taken", s)
		} else if strings.Contains(err.Error(), k.Secret()[20:30]) {
			t.Errorf("error quotes the key: %v", err)
		}
	}
	for _, s := range []string{"", "x:", p.String() + "=", p.String()[1+len(p.Name):], "\x00" + p.String()} {
		if _, err := ParsePublicKey(s); err == nil {
			t.Errorf("public key %q is taken", s)
		}
	}
	if s := fmt.Sprintf("%v %+v %#v %s", k, k, k, k); strings.Contains(s, k.Secret()[len(k.Name)+5:][:20]) {
		t.Errorf("printed: %s", s)
	}
	if _, err := GenerateSigningKey("a:b", rand.Reader); err == nil {
		t.Error("name with colon is taken")
	}
	if _, err := GenerateSigningKey("x", bytes.NewReader(make([]byte, 31))); err == nil {
		t.Error("too little randomness is taken")
	}
}

func FuzzParseSignature(f *testing.F) {
	for _, info := range goldenInfos(f) {
		for _, sig := range info.Signatures {
			f.Add(sig)
		}
	}
	k, p := goldenKeys(f)
	f.Add(k.Secret())
	f.Add(p.String())
	f.Fuzz(func(t *testing.T, s string) {
		if name, sig, err := ParseSignature(s); err == nil && (name == "" || len(sig) != 64) {
			t.Errorf("%q: %q, %x", s, name, sig)
		}
		if p, err := ParsePublicKey(s); err == nil && p.String() != s {
			t.Errorf("%q became %q", s, p)
		}
		if k, err := ParseSigningKey(s); err == nil && k.Secret() != s {
			t.Errorf("%q became %q", s, k.Secret())
		}
		p.Verify("", s)
	})
}
