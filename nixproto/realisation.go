package nixproto

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// ID returns the realisation's key, "sha256:<hex>!<output>".
func (r Realisation) ID() string {
	return r.DrvHash.Algo().String() + ":" + r.DrvHash.Base16() + "!" + r.OutputName
}

// ParseRealisationID reads what ID returns; the hash may have any spelling that
// names its algorithm.
func ParseRealisationID(s string) (drvHash Hash, output string, err error) {
	hash, output, ok := strings.Cut(s, "!")
	if !ok {
		return Hash{}, "", fmt.Errorf("parse realisation id %q: no output", clip(s))
	}
	if drvHash, err = ParseHash(0, hash); err == nil {
		err = CheckName(output)
	}
	if err != nil {
		return Hash{}, "", fmt.Errorf("parse realisation id %q: %w", clip(s), err)
	}
	return drvHash, output, nil
}

// realisationJSONForm is the JSON of Nix 2.4 to 2.34 (libstore's
// realisation.cc). Its members are sorted, as Nix prints and signs them.
type realisationJSONForm struct {
	Dependent  map[string]string `json:"dependentRealisations"`
	ID         string            `json:"id"`
	OutPath    string            `json:"outPath"`
	Signatures *[]string         `json:"signatures,omitempty"`
}

func (r Realisation) form() realisationJSONForm {
	f := realisationJSONForm{Dependent: r.Dependent, ID: r.ID(), OutPath: r.OutPath.Base()}
	if f.Dependent == nil {
		f.Dependent = map[string]string{}
	}
	return f
}

// JSON returns the realisation as Nix prints it on the wire and in the file
// realisations/<id>.doi of a binary cache.
func (r Realisation) JSON() []byte {
	f := r.form()
	sigs := append([]string{}, r.Signatures...) // [] rather than null
	f.Signatures = &sigs
	return marshalCompact(f)
}

// Fingerprint returns what signatures of the realisation sign: its JSON without
// signatures.
func (r Realisation) Fingerprint() string { return string(marshalCompact(r.form())) }

// marshalCompact returns v as JSON without the escapes that HTML wants.
func marshalCompact(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(err) // strings, and lists and maps of them, do not fail
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// ParseRealisation reads the JSON of a realisation. It wants "id" and
// "outPath"; other members are optional, and unknown ones are ignored.
func ParseRealisation(text []byte) (Realisation, error) {
	r, err := parseRealisation(text)
	if err != nil {
		return Realisation{}, fmt.Errorf("parse realisation: %w", err)
	}
	return r, nil
}

func parseRealisation(text []byte) (r Realisation, err error) {
	var f realisationJSONForm
	if err := json.Unmarshal(text, &f); err != nil {
		return r, err
	}
	if r.DrvHash, r.OutputName, err = ParseRealisationID(f.ID); err != nil {
		return r, err
	}
	if r.OutPath, err = ParseBaseName(f.OutPath); err != nil {
		return r, err
	}
	for _, id := range slices.Sorted(maps.Keys(f.Dependent)) {
		if _, _, err := ParseRealisationID(id); err != nil {
			return r, err
		}
		if _, err := ParseBaseName(f.Dependent[id]); err != nil {
			return r, err
		}
	}
	if len(f.Dependent) > 0 {
		r.Dependent = f.Dependent
	}
	if f.Signatures != nil && len(*f.Signatures) > 0 {
		r.Signatures = *f.Signatures
	}
	return r, nil
}

// Sign adds a signature by k, unless it is there.
func (r *Realisation) Sign(k SigningKey) {
	if sig := k.Sign(r.Fingerprint()); !slices.Contains(r.Signatures, sig) {
		r.Signatures = append(r.Signatures, sig)
	}
}
