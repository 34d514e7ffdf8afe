package nixproto

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// NarInfo is what a binary cache says of a path: "<hash part>.narinfo" (Nix's
// nar-info.cc). PathInfo's RegistrationTime and Ultimate are not part of it.
type NarInfo struct {
	PathInfo
	URL         string // of the archive, relative to the cache
	Compression string // "none", "xz", "zstd" …
	FileHash    Hash   // of the file at URL; zero if unknown
	FileSize    uint64 // of the file at URL, in bytes; 0 if unknown
}

// maxNarInfo bounds the text of a narinfo, in bytes.
const maxNarInfo = 4 << 20

// AppendText appends the text of the narinfo, its fields in Nix's order. It
// returns no error; the result is that of encoding.TextAppender.
func (n *NarInfo) AppendText(b []byte) ([]byte, error) {
	line := func(key, value string) {
		b = append(append(append(append(b, key...), ": "...), value...), '\n')
	}
	line("StorePath", string(n.Path))
	line("URL", n.URL)
	line("Compression", n.Compression)
	if !n.FileHash.IsZero() {
		line("FileHash", n.FileHash.String())
	}
	if n.FileSize > 0 {
		line("FileSize", strconv.FormatUint(n.FileSize, 10))
	}
	line("NarHash", n.NarHash.String())
	line("NarSize", strconv.FormatUint(n.NarSize, 10))
	refs := make([]string, len(n.References))
	for i, r := range n.References {
		refs[i] = r.Base()
	}
	line("References", strings.Join(refs, " "))
	if n.Deriver != "" {
		line("Deriver", n.Deriver.Base())
	}
	for _, sig := range n.Signatures {
		line("Sig", sig)
	}
	if n.CA != "" {
		line("CA", n.CA)
	}
	return b, nil
}

// ParseNarInfo reads a narinfo. Unknown fields are ignored; a known one other
// than Sig may come once. Signatures are checked for their form only.
func ParseNarInfo(text []byte) (*NarInfo, error) {
	n, err := parseNarInfo(text)
	if err != nil {
		return nil, fmt.Errorf("parse narinfo: %w", err)
	}
	return n, nil
}

func parseNarInfo(text []byte) (*NarInfo, error) {
	if len(text) > maxNarInfo {
		return nil, fmt.Errorf("longer than %d bytes", maxNarInfo)
	}
	n := &NarInfo{Compression: "bzip2"} // Nix's oldest, when nothing is said
	seen := map[string]bool{}
	for rest := string(text); rest != ""; {
		line, after, ok := strings.Cut(rest, "\n")
		if !ok {
			return nil, fmt.Errorf("line %q has no end", clip(rest))
		}
		rest = after
		key, value, ok := strings.Cut(line, ": ")
		if !ok {
			return nil, fmt.Errorf("line %q has no field", clip(line))
		}
		if seen[key] && key != "Sig" && narInfoFields[key] != nil {
			return nil, fmt.Errorf("field %s comes twice", key)
		}
		if parse := narInfoFields[key]; parse != nil {
			seen[key] = true
			if err := parse(n, value); err != nil {
				return nil, fmt.Errorf("field %s: %w", key, err)
			}
		}
	}
	for _, key := range []string{"StorePath", "URL", "NarHash", "NarSize"} {
		if !seen[key] {
			return nil, fmt.Errorf("no field %s", key)
		}
	}
	return n, nil
}

// narInfoFields reads the value of each known field.
var narInfoFields = map[string]func(n *NarInfo, value string) error{
	"StorePath": func(n *NarInfo, v string) (err error) {
		n.Path, err = ParseStorePath(v)
		return err
	},
	"URL": func(n *NarInfo, v string) error {
		if v == "" {
			return errors.New("empty")
		}
		n.URL = v
		return nil
	},
	"Compression": func(n *NarInfo, v string) error {
		if v != "" {
			n.Compression = v
		}
		return nil
	},
	"FileHash": func(n *NarInfo, v string) (err error) {
		n.FileHash, err = ParseHash(0, v)
		return err
	},
	"FileSize": func(n *NarInfo, v string) (err error) {
		n.FileSize, err = strconv.ParseUint(v, 10, 64)
		return err
	},
	"NarHash": func(n *NarInfo, v string) (err error) {
		if n.NarHash, err = ParseHash(0, v); err == nil && n.NarHash.Algo() != SHA256 {
			err = errors.New("not a SHA-256")
		}
		return err
	},
	"NarSize": func(n *NarInfo, v string) (err error) {
		if n.NarSize, err = strconv.ParseUint(v, 10, 64); err == nil && n.NarSize == 0 {
			err = errors.New("zero")
		}
		return err
	},
	"References": parseNarInfoReferences,
	"Deriver": func(n *NarInfo, v string) (err error) {
		if v != "unknown-deriver" {
			n.Deriver, err = ParseBaseName(v)
		}
		return err
	},
	"Sig": func(n *NarInfo, v string) error {
		n.Signatures = append(n.Signatures, v)
		_, _, err := ParseSignature(v)
		return err
	},
	"CA": func(n *NarInfo, v string) error {
		n.CA = v
		_, err := ParseContentAddress(v)
		return err
	},
}

func parseNarInfoReferences(n *NarInfo, value string) error {
	for base := range strings.FieldsSeq(value) {
		r, err := ParseBaseName(base)
		if err != nil {
			return err
		}
		n.References = append(n.References, r)
	}
	slices.Sort(n.References)
	n.References = slices.Compact(n.References)
	return nil
}
