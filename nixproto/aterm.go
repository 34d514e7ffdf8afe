package nixproto

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// The text of a .drv file is an ATerm (Nix's derivations.cc, "Store Derivation
// and Deriving Path" in its manual):
//
//	Derive([("out","<path>","<method and algorithm>","<hash>"),…],
//	  [("<drv>",["out",…]),…],["<source>",…],"system","builder",["arg",…],
//	  [("key","value"),…])
//
// without white space. Everything but args is sorted bytewise. In a string, "
// and \ stand behind a backslash, and newline, carriage return and tab are \n,
// \r and \t.

// ParseDerivation reads the text of the file <name>.drv. It takes only text that
// ATerm would print, so that equal derivations have equal text; Nix prints no
// other. Strings of the result may share memory with one another. Dynamic
// derivations (DrvWithVersion) are refused. Kind is not checked.
func ParseDerivation(name string, text []byte) (*Derivation, error) {
	d, err := parseDerivation(name, text)
	if err != nil {
		return nil, fmt.Errorf("%w %q: %w", ErrInvalidDerivation, clip(name), err)
	}
	return d, nil
}

func parseDerivation(name string, text []byte) (*Derivation, error) {
	switch {
	case len(text) > MaxMessage:
		return nil, fmt.Errorf("longer than %d bytes", MaxMessage)
	case bytes.HasPrefix(text, []byte("DrvWithVersion(")):
		return nil, errors.New("dynamic derivations are not supported")
	}
	if err := CheckName(name + DerivationSuffix); err != nil {
		return nil, err
	}
	p := atermParser{rest: string(text)}
	d := p.derivation()
	d.Name = name
	if p.err == nil && p.rest != "" {
		p.fail("end")
	}
	if p.err != nil {
		return nil, fmt.Errorf("at byte %d: %w", len(text)-len(p.rest), p.err)
	}
	if !bytes.Equal(d.ATerm(), text) {
		return nil, errors.New("not as Nix prints it: order, repetition or escapes")
	}
	return d, nil
}

// An atermParser takes the text from its front. Its error stays, and ends every
// loop.
type atermParser struct {
	rest string
	err  error
}

func (p *atermParser) derivation() *Derivation {
	d := &Derivation{Outputs: map[string]DerivationOutput{}, Env: map[string]string{}}
	p.literal("Derive(")
	p.list(func() { p.output(d) })
	p.literal(",")
	p.list(func() { p.inputDrv(d) })
	p.literal(",")
	p.list(func() { d.InputSrcs = append(d.InputSrcs, p.path()) })
	p.literal(",")
	d.System = p.str()
	p.literal(",")
	d.Builder = p.str()
	p.literal(",")
	p.list(func() { d.Args = append(d.Args, p.str()) })
	p.literal(",")
	p.list(func() {
		p.literal("(")
		key := p.str()
		p.literal(",")
		d.Env[key] = p.str()
		p.literal(")")
	})
	p.literal(")")
	return d
}

func (p *atermParser) output(d *Derivation) {
	p.literal("(")
	name := p.str()
	if err := CheckName(name); err != nil && p.err == nil {
		p.err = fmt.Errorf("output: %w", err)
	}
	var out DerivationOutput
	p.literal(",")
	if strings.HasPrefix(p.rest, `""`) {
		p.literal(`""`)
	} else {
		out.Path = p.path()
	}
	p.literal(",")
	out.HashAlgo = p.str()
	p.literal(",")
	out.Hash = p.str()
	p.literal(")")
	d.Outputs[name] = out
}

func (p *atermParser) inputDrv(d *Derivation) {
	p.literal("(")
	drv := p.path()
	if p.err == nil && !drv.IsDerivation() {
		p.err = fmt.Errorf("input %s is not a derivation", drv)
	}
	p.literal(",")
	outputs := []string{}
	p.list(func() { outputs = append(outputs, p.str()) })
	p.literal(")")
	if d.InputDrvs == nil {
		d.InputDrvs = map[StorePath][]string{}
	}
	d.InputDrvs[drv] = outputs
}

// list takes a list, with item taking each of its items.
func (p *atermParser) list(item func()) {
	p.literal("[")
	for first := true; p.err == nil; first = false {
		if strings.HasPrefix(p.rest, "]") {
			break
		}
		if !first {
			p.literal(",")
		}
		item()
	}
	p.literal("]")
}

// path takes a string that is a store path.
func (p *atermParser) path() StorePath {
	s := p.str()
	if p.err != nil {
		return ""
	}
	path, err := ParseStorePath(s)
	p.err = err
	return path
}

// str takes a string.
func (p *atermParser) str() string {
	p.literal(`"`)
	if p.err != nil {
		return ""
	}
	end := strings.IndexAny(p.rest, `"\`)
	if end >= 0 && p.rest[end] == '"' {
		s := p.rest[:end]
		p.rest = p.rest[end+1:]
		return s
	}
	return p.escaped()
}

// escaped takes the rest of a string with escapes.
func (p *atermParser) escaped() string {
	var b strings.Builder
	for {
		i := strings.IndexAny(p.rest, `"\`)
		if i < 0 || (p.rest[i] == '\\' && i+1 == len(p.rest)) {
			p.fail("end of a string")
			return ""
		}
		b.WriteString(p.rest[:i])
		if p.rest[i] == '"' {
			p.rest = p.rest[i+1:]
			return b.String()
		}
		c := p.rest[i+1]
		p.rest = p.rest[i+2:]
		switch c {
		case 'n':
			c = '\n'
		case 'r':
			c = '\r'
		case 't':
			c = '\t'
		}
		b.WriteByte(c)
	}
}

// literal takes s.
func (p *atermParser) literal(s string) {
	if p.err != nil {
		return
	}
	var ok bool
	if p.rest, ok = strings.CutPrefix(p.rest, s); !ok {
		p.fail("%q", s)
	}
}

func (p *atermParser) fail(format string, args ...any) {
	if p.err == nil {
		p.err = errors.New("wanted " + fmt.Sprintf(format, args...))
	}
}

// ATerm returns the text of the .drv file.
func (d *Derivation) ATerm() []byte {
	inputs := make([]atermInput, 0, len(d.InputDrvs))
	for drv, outputs := range d.InputDrvs {
		inputs = append(inputs, atermInput{string(drv), outputs})
	}
	return d.appendATerm(nil, inputs, false)
}

// An atermInput is an input derivation as printed: by its path, or by its hash
// modulo.
type atermInput struct {
	key     string
	outputs []string
}

// appendATerm prints d to b with those inputs, which it sorts. If mask is set,
// the paths of outputs are empty, and so are the environment variables with
// their names.
func (d *Derivation) appendATerm(b []byte, inputs []atermInput, mask bool) []byte {
	b = append(b, "Derive("...)
	b = appendList(b, d.OutputNames(), func(b []byte, name string) []byte {
		out := d.Outputs[name]
		if mask {
			out.Path = ""
		}
		return appendTuple(b, name, string(out.Path), out.HashAlgo, out.Hash)
	})
	b = append(b, ',')
	slices.SortFunc(inputs, func(x, y atermInput) int { return strings.Compare(x.key, y.key) })
	b = appendList(b, inputs, func(b []byte, in atermInput) []byte {
		b = append(appendQuoted(append(b, '('), in.key), ',')
		outputs := slices.Compact(slices.Sorted(slices.Values(in.outputs)))
		return append(appendList(b, outputs, appendQuoted), ')')
	})
	b = append(b, ',')
	srcs := slices.Compact(slices.Sorted(slices.Values(d.InputSrcs)))
	b = appendList(b, srcs, func(b []byte, p StorePath) []byte { return appendQuoted(b, string(p)) })
	b = append(appendQuoted(append(b, ','), d.System), ',')
	b = append(appendQuoted(b, d.Builder), ',')
	b = append(appendList(b, d.Args, appendQuoted), ',')
	b = appendList(b, slices.Sorted(maps.Keys(d.Env)), func(b []byte, key string) []byte {
		value := d.Env[key]
		if _, output := d.Outputs[key]; output && mask {
			value = ""
		}
		return appendTuple(b, key, value)
	})
	return append(b, ')')
}

func appendList[T any](b []byte, items []T, item func([]byte, T) []byte) []byte {
	b = append(b, '[')
	for i, x := range items {
		if i > 0 {
			b = append(b, ',')
		}
		b = item(b, x)
	}
	return append(b, ']')
}

func appendTuple(b []byte, fields ...string) []byte {
	for i, f := range fields {
		if i == 0 {
			b = append(b, '(')
		} else {
			b = append(b, ',')
		}
		b = appendQuoted(b, f)
	}
	return append(b, ')')
}

func appendQuoted(b []byte, s string) []byte {
	b = append(b, '"')
	for {
		i := strings.IndexAny(s, "\"\\\n\r\t")
		if i < 0 {
			return append(append(b, s...), '"')
		}
		b = append(append(b, s[:i]...), '\\')
		switch c := s[i]; c {
		case '\n':
			b = append(b, 'n')
		case '\r':
			b = append(b, 'r')
		case '\t':
			b = append(b, 't')
		default:
			b = append(b, c)
		}
		s = s[i+1:]
	}
}
