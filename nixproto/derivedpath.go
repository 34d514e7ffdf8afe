package nixproto

import (
	"fmt"
	"strings"
)

// A DerivedPath is what a client asks to have made valid: a store path as it is,
// or outputs of a derivation. The wire spells it "<path>", "<drv>!<output>,…"
// or "<drv>!*".
type DerivedPath struct {
	Path StorePath
	// Outputs are the wanted outputs of the derivation Path, in the client's
	// order.
	Outputs []string
	// AllOutputs wants all of them; Outputs is nil then. Neither means Path
	// itself.
	AllOutputs bool
}

// Built reports whether outputs of the derivation Path are meant, not Path
// itself.
func (p DerivedPath) Built() bool { return p.AllOutputs || len(p.Outputs) > 0 }

// String returns the spelling of the worker protocol.
func (p DerivedPath) String() string {
	switch {
	case p.AllOutputs:
		return string(p.Path) + "!*"
	case len(p.Outputs) > 0:
		return string(p.Path) + "!" + strings.Join(p.Outputs, ",")
	}
	return string(p.Path)
}

// ParseDerivedPath reads the spelling of the worker protocol from 1.30 on.
// Outputs of outputs (dynamic derivations) are refused.
func ParseDerivedPath(s string) (DerivedPath, error) {
	base, outputs, built := strings.Cut(s, "!")
	path, err := ParseStorePath(base)
	if err != nil {
		return DerivedPath{}, err
	}
	if !built {
		return DerivedPath{Path: path}, nil
	}
	if !path.IsDerivation() {
		return DerivedPath{}, fmt.Errorf("%q is not a derivation and has no outputs", path)
	}
	if strings.Contains(outputs, "!") {
		return DerivedPath{}, fmt.Errorf("%q needs dynamic derivations, which are not supported", clip(s))
	}
	if outputs == "*" {
		return DerivedPath{Path: path, AllOutputs: true}, nil
	}
	names := strings.Split(outputs, ",")
	for _, name := range names {
		if err := CheckName(name); err != nil {
			return DerivedPath{}, fmt.Errorf("outputs of %q: %w", path, err)
		}
	}
	return DerivedPath{Path: path, Outputs: names}, nil
}

// parseLegacyDerivedPath reads the spelling of the serve protocol, where a
// derivation alone means all of its outputs.
func parseLegacyDerivedPath(s string) (DerivedPath, error) {
	p, err := ParseDerivedPath(s)
	if err == nil && !p.Built() && p.Path.IsDerivation() {
		p.AllOutputs = true
	}
	return p, err
}

// legacyString returns the spelling of the serve protocol.
func (p DerivedPath) legacyString() string {
	if p.AllOutputs {
		return string(p.Path)
	}
	return p.String()
}

func (p *DerivedPath) fields(c codec) {
	format, parse := DerivedPath.String, ParseDerivedPath
	if c.v.serve() {
		format, parse = DerivedPath.legacyString, parseLegacyDerivedPath
	}
	if !c.reading() {
		c.w.Str(format(*p))
		return
	}
	var err error
	if *p, err = parse(c.r.str(maxSmall)); err != nil {
		c.r.reject(err)
	}
}

func derivedPaths(c codec, list *[]DerivedPath) {
	items(c, list, func(p *DerivedPath) { p.fields(c) })
}
