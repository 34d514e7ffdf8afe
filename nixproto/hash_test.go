package nixproto

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

// What nix-hash --flat and base64 say of a file with hello in it.
var hashTests = []struct{ algo, hex, nix32, base64 string }{
	{"md5", "5d41402abc4b2a76b9719d911017c592", "4jqlbi14cxf6wpcajbphm40hax", "XUFAKrxLKna5cZ2REBfFkg=="},
	{"sha1", "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d", "9m1skbnr5i43n3yypvda5s65vhfwdx5a", "qvTGHdzF6KLavt4PO0gs2a6pQ00="},
	{
		"sha256", "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
		"094qif9n4cq4fdg459qzbhg1c6wywawwaaivx0k0x8xhbyx4vwic", "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=",
	},
	{
		"sha512",
		"9b71d224bd62f3785d96d46ad3ea3d73319bfbc2890caadae2dff72519673ca72323c3d99ba5c11d7c7acc6e14b8c5da0c4663475c2e5c3adef46f73bcdec043",
		"11w1pmwfdpz9pisbhp5qiv38q6dmidq2ipcqykw3p0sb6yrqcij79rwcwcjbxyzwbdal349qbxrncbk7pmd6snljrfpiwv2pljd4wcv",
		"m3HSJL1i83hdltRq0+o9czGb+8KJDKra4t/3JRlnPKcjI8PZm6XBHXx6zG4UuMXaDEZjR1wuXDre9G9zvN7AQw==",
	},
}

func TestHashSpellings(t *testing.T) {
	for _, tt := range hashTests {
		algo, err := ParseHashAlgo(tt.algo)
		if err != nil {
			t.Fatal(err)
		}
		hasher := NewHasher(algo)
		hasher.Write([]byte("hello"))
		want := HashFromSum(algo, hasher)
		if want.Base16() != tt.hex || want.Base32() != tt.nix32 || want.Base64() != tt.base64 {
			t.Errorf("%s: %s %s %s", tt.algo, want.Base16(), want.Base32(), want.Base64())
		}
		if got := want.SRI(); got != tt.algo+"-"+tt.base64 {
			t.Errorf("SRI = %s", got)
		}
		if got := want.String(); got != tt.algo+":"+tt.nix32 {
			t.Errorf("String = %s", got)
		}
		if !bytes.Equal(want.Bytes(), hasher.Sum(nil)) || want.Algo() != algo || want.IsZero() {
			t.Errorf("%s: Bytes, Algo or IsZero", tt.algo)
		}
		for _, digest := range []string{tt.hex, strings.ToUpper(tt.hex), tt.nix32, tt.base64} {
			for _, a := range []HashAlgo{0, algo} {
				if got, err := ParseHash(a, tt.algo+":"+digest); err != nil || got != want {
					t.Errorf("ParseHash(%v, %s:%s) = %v, %v", a, tt.algo, digest, got, err)
				}
			}
			if got, err := ParseHash(algo, digest); err != nil || got != want {
				t.Errorf("ParseHash(%v, %s) = %v, %v", algo, digest, got, err)
			}
			if _, err := ParseHash(0, digest); err == nil {
				t.Errorf("%s needs no algorithm", digest)
			}
		}
		if got, err := ParseHash(0, tt.algo+"-"+tt.base64); err != nil || got != want {
			t.Errorf("SRI: %v, %v", got, err)
		}
		other := SHA512 + MD5 - algo // MD5 and SHA512, SHA1 and SHA256
		if _, err := ParseHash(other, tt.algo+":"+tt.hex); err == nil {
			t.Errorf("%v is taken for %v", algo, other)
		}
	}
}

func TestParseHashMalformed(t *testing.T) {
	h := hashTests[2]
	for _, s := range []string{
		"", ":", "-", "sha256", "sha256:", "sha256-", "sha3:" + h.hex, ":" + h.hex, "SHA256:" + h.hex,
		h.hex + "0", h.hex[1:], "g" + h.hex[1:], "sha256-" + h.hex, "sha256-" + h.nix32, "sha256:sha256:" + h.hex,
		"e" + h.nix32[1:], "z" + h.nix32[1:], h.nix32 + " ", strings.ToUpper(h.nix32),
		strings.TrimRight(h.base64, "="), h.base64[:42] + "==", h.base64[:42] + "\n=", h.base64[:42] + "R=",
		strings.ReplaceAll(h.base64, "+", "_"), strings.Repeat("A", 1<<20),
	} {
		if got, err := ParseHash(SHA256, s); err == nil {
			t.Errorf("ParseHash(%q) = %v", s, got)
		} else if len(err.Error()) > 400 {
			t.Errorf("error of %d bytes", len(err.Error()))
		}
	}
}

func TestHashJSON(t *testing.T) {
	type both struct{ A, B Hash }
	v := both{A: SumSHA256([]byte("hello"))}
	b, err := json.Marshal(v)
	if want := `{"A":"sha256:` + hashTests[2].nix32 + `","B":""}`; err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}
	var got both
	if err := json.Unmarshal(b, &got); err != nil || got != v {
		t.Errorf("%v, %v", got, err)
	}
	if err := json.Unmarshal([]byte(`{"A":"`+hashTests[2].hex+`"}`), &got); err == nil {
		t.Error("a hash without algorithm is taken")
	}
}

func TestFold(t *testing.T) {
	if got := Fold([]byte{1, 2, 4, 8, 16}, 2); !bytes.Equal(got, []byte{1 ^ 4 ^ 16, 2 ^ 8}) {
		t.Errorf("%v", got)
	}
}

func FuzzParseHash(f *testing.F) {
	for _, tt := range hashTests {
		for _, s := range []string{tt.algo + ":" + tt.hex, tt.nix32, tt.base64, tt.algo + "-" + tt.base64} {
			f.Add(uint8(0), s)
			f.Add(uint8(SHA256), s)
		}
	}
	f.Fuzz(func(t *testing.T, a uint8, s string) {
		h, err := ParseHash(HashAlgo(a), s)
		if err != nil {
			return
		}
		for _, s := range []string{h.String(), h.SRI(), h.Algo().String() + ":" + h.Base16()} {
			if got, err := ParseHash(0, s); err != nil || got != h {
				t.Errorf("%s: %v, %v", s, got, err)
			}
		}
	})
}

func FuzzNix32(f *testing.F) {
	for _, tt := range hashTests {
		f.Add(tt.nix32)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := DecodeNix32(s)
		if err == nil && EncodeNix32(b) != s {
			t.Errorf("%q became %q", s, EncodeNix32(b))
		}
		if got, err := DecodeNix32(EncodeNix32([]byte(s))); err != nil || string(got) != s {
			t.Errorf("%q came back as %q, %v", s, got, err)
		}
	})
}
