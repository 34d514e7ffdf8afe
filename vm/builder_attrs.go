package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"nbd/nixproto"
)

// Structured attributes (__structuredAttrs) reach the builder as two files: all
// of them as JSON, and those that a shell has types for as declarations. Both
// have to be what Nix writes, byte for byte, since builders may keep them. Nix
// uses the C++ library nlohmann::json, whose members are sorted by name and
// whose numbers have forms of their own.

// parseStructuredAttrs parses the value of __json, a JSON object. Numbers are
// kept as json.Number.
func parseStructuredAttrs(text string) (map[string]any, error) {
	if !utf8.ValidString(text) {
		return nil, errors.New("it is not UTF-8")
	}
	d := json.NewDecoder(strings.NewReader(text)) // refuses to nest very deeply
	d.UseNumber()
	var object map[string]any
	if err := d.Decode(&object); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the object")
	}
	if object == nil {
		return nil, errors.New("it is not an object")
	}
	return object, nil
}

// addStructuredAttrs writes .attrs.json and .attrs.sh and the variables that
// name them.
func addStructuredAttrs(env map[string]string, files map[string][]byte, spec *Spec, opts *buildOptions, graph *referenceGraph) error {
	attrs := maps.Clone(opts.structured)
	outputs := map[string]any{}
	for name := range spec.Drv.Outputs {
		outputs[name] = nixproto.Placeholder(name)
	}
	attrs["outputs"] = outputs
	for _, g := range opts.graphs {
		closure, err := graph.export(g.paths)
		if err != nil {
			return err
		}
		if attrs[g.name], err = graph.attribute(closure); err != nil {
			return err
		}
	}
	files[".attrs.json"] = appendJSON(nil, attrs)
	files[".attrs.sh"] = shellDeclarations(attrs)
	env["NIX_ATTRS_JSON_FILE"] = buildDir + "/.attrs.json"
	env["NIX_ATTRS_SH_FILE"] = buildDir + "/.attrs.sh"
	return nil
}

// appendJSON appends v as nlohmann::json dumps it. It recurses as deep as the
// decoder allowed the value to be.
func appendJSON(b []byte, v any) []byte {
	switch v := v.(type) {
	case nil:
		return append(b, "null"...)
	case bool:
		return strconv.AppendBool(b, v)
	case string:
		return appendJSONString(b, v)
	case json.Number:
		return append(b, nixNumber(v)...)
	case []any:
		b = append(b, '[')
		for i, item := range v {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendJSON(b, item)
		}
		return append(b, ']')
	case map[string]any:
		b = append(b, '{')
		for i, name := range slices.Sorted(maps.Keys(v)) {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(appendJSONString(b, name), ':')
			b = appendJSON(b, v[name])
		}
		return append(b, '}')
	}
	panic(fmt.Sprintf("no JSON value: %T", v))
}

func appendJSONString(b []byte, s string) []byte {
	const escapes = "\bb\tt\nn\ff\rr\"\"\\\\"
	b = append(b, '"')
	for i := range len(s) {
		c := s[i]
		if at := strings.IndexByte(escapes, c); at >= 0 && at%2 == 0 {
			b = append(b, '\\', escapes[at+1])
		} else if c < 0x20 {
			b = fmt.Appendf(b, `\u%04x`, c)
		} else {
			b = append(b, c)
		}
	}
	return append(b, '"')
}

// A number is an integer of 64 bits or a double.
type number struct {
	integer bool
	bits    uint64 // of the integer, signed or not
	signed  bool   // the integer is negative
	double  float64
}

// parseNumber takes a JSON number as nlohmann::json does.
func parseNumber(text json.Number) number {
	s := string(text)
	if !strings.ContainsAny(s, ".eE") {
		if i, err := strconv.ParseInt(s, 10, 64); err == nil {
			return number{integer: true, bits: uint64(i), signed: i < 0}
		}
		if u, err := strconv.ParseUint(s, 10, 64); err == nil {
			return number{integer: true, bits: u}
		}
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		f = math.Copysign(math.Inf(1), f) // out of range
	}
	return number{double: f}
}

// nixNumber returns a number as nlohmann::json writes it.
func nixNumber(text json.Number) string {
	n := parseNumber(text)
	switch {
	case n.signed:
		return strconv.FormatInt(int64(n.bits), 10)
	case n.integer:
		return strconv.FormatUint(n.bits, 10)
	case math.IsInf(n.double, 0):
		return "null"
	}
	// The library's digits are not always the fewest that tell a double from
	// its neighbours. It wrote this text, so that what has its form stays.
	if digits, exponent, ok := decimal(string(text)); ok && len(digits) <= 17 {
		if layoutDouble(n.double, digits, exponent) == string(text) {
			return string(text)
		}
	}
	digits, exponent, _ := decimal(strconv.FormatFloat(math.Abs(n.double), 'e', -1, 64))
	return layoutDouble(n.double, digits, exponent)
}

// decimal splits a number into its significant digits and the place of its
// decimal point, counted from before the first of them. Zero has no digits.
func decimal(text string) (digits string, point int, ok bool) {
	mantissa, exp, hasExp := strings.Cut(strings.ToLower(strings.TrimPrefix(text, "-")), "e")
	if hasExp {
		var err error
		if point, err = strconv.Atoi(exp); err != nil {
			return "", 0, false
		}
	}
	whole, fraction, _ := strings.Cut(mantissa, ".")
	point += len(whole)
	digits = whole + fraction
	trimmed := strings.TrimLeft(digits, "0")
	point -= len(digits) - len(trimmed)
	return strings.TrimRight(trimmed, "0"), point, true
}

// layoutDouble writes digits with the decimal point at a place: without an
// exponent from 1e-4 to below 1e15, always with a point or an exponent.
func layoutDouble(f float64, digits string, point int) string {
	var b strings.Builder
	if math.Signbit(f) {
		b.WriteByte('-')
	}
	n := len(digits)
	switch {
	case n == 0:
		b.WriteString("0.0")
	case n <= point && point <= 15:
		b.WriteString(digits + strings.Repeat("0", point-n) + ".0")
	case 0 < point && point <= 15:
		b.WriteString(digits[:point] + "." + digits[point:])
	case -4 < point && point <= 0:
		b.WriteString("0." + strings.Repeat("0", -point) + digits)
	default:
		b.WriteString(digits[:1])
		if n > 1 {
			b.WriteString("." + digits[1:])
		}
		fmt.Fprintf(&b, "e%+03d", point-1)
	}
	return b.String()
}

// shellDeclarations returns what bash declares the attributes with. Attributes
// without a shell's name, or of a shape that it lacks, are left out.
func shellDeclarations(attrs map[string]any) []byte {
	var b []byte
	for _, name := range slices.Sorted(maps.Keys(attrs)) {
		if !isShellName(name) {
			continue
		}
		if s, ok := shellScalar(attrs[name]); ok {
			b = fmt.Appendf(b, "declare %s=%s\n", name, s)
			continue
		}
		switch v := attrs[name].(type) {
		case []any:
			if s, ok := shellArray(v); ok {
				b = fmt.Appendf(b, "declare -a %s=(%s)\n", name, s)
			}
		case map[string]any:
			if s, ok := shellMap(v); ok {
				b = fmt.Appendf(b, "declare -A %s=(%s)\n", name, s)
			}
		}
	}
	return b
}

func shellArray(list []any) (string, bool) {
	var b strings.Builder
	for _, v := range list {
		s, ok := shellScalar(v)
		if !ok {
			return "", false
		}
		b.WriteString(s + " ")
	}
	return b.String(), true
}

func shellMap(m map[string]any) (string, bool) {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m)) {
		s, ok := shellScalar(m[name])
		if !ok {
			return "", false
		}
		fmt.Fprintf(&b, "[%s]=%s ", shellQuote(name), s)
	}
	return b.String(), true
}

// shellScalar returns a value that is one word for a shell.
func shellScalar(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return shellQuote(v), true
	case nil:
		return "''", true
	case bool:
		if v {
			return "1", true
		}
		return "", true
	case json.Number:
		return shellNumber(v)
	}
	return "", false
}

// shellNumber returns a number that is whole in single precision, as Nix's
// conversion to a C int has it: integers lose their upper half, doubles out of
// range become the smallest int (what x86 does).
func shellNumber(text json.Number) (string, bool) {
	n := parseNumber(text)
	if n.integer {
		return strconv.Itoa(int(int32(uint32(n.bits)))), true
	}
	single := float64(float32(n.double))
	if math.Ceil(single) != single {
		return "", false
	}
	i := int32(math.MinInt32)
	if t := math.Trunc(n.double); t > math.MinInt32 && t <= math.MaxInt32 {
		i = int32(t)
	}
	return strconv.Itoa(int(i)), true
}

func shellQuote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
