package settings

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Where settings come from: variables of an SSH session, attributes of a
// derivation. NBD_ and the name in upper case, _ for -; NIXBUILDNET_ is an
// alias that counts where the first spelling says nothing.

// prefixes are those of variables; the first one wins.
var prefixes = [...]string{"NBD_", "NIXBUILDNET_"}

// tagWord follows a prefix in the names of tags.
const tagWord = "TAG_"

// Bounds of tags.
const (
	maxTags     = 50
	maxTagName  = 64
	maxTagValue = 1024
)

// IsVariable reports whether a variable may be a setting.
func IsVariable(name string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// variableName is how a setting's name is spelled behind a prefix.
func variableName(name string) string { return strings.ToUpper(strings.ReplaceAll(name, "-", "_")) }

var byVariable = func() map[string]*Setting {
	m := make(map[string]*Setting, len(table))
	for i := range table {
		m[variableName(table[i].Name)] = &table[i]
	}
	return m
}()

// FromEnvironment reads the variables of an SSH session. Those without one of
// the prefixes are not looked at. Its error is an *Error about a tag.
func FromEnvironment(env map[string]string) (Layer, error) { return fromVariables(Environment, env) }

// FromDerivation reads the attributes of a derivation: its environment, and the
// JSON object of __structuredAttrs, which is in the variable __json.
func FromDerivation(env map[string]string) (Layer, error) {
	text, ok := env["__json"]
	if !ok {
		return fromVariables(Derivation, env)
	}
	var attrs map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &attrs); err != nil {
		return Layer{Level: Derivation}, nil // what is wrong with it is told by who builds
	}
	vars := make(map[string]string)
	for name, raw := range attrs {
		if !IsVariable(name) {
			continue
		}
		text, ok, err := attributeText(raw)
		if err != nil {
			return Layer{}, &Error{Setting: name, Variable: name, Err: err}
		}
		if ok {
			vars[name] = text
		}
	}
	return fromVariables(Derivation, vars)
}

// attributeText returns a JSON value as Nix would have written it into an
// environment; ok is false for null.
func attributeText(raw json.RawMessage) (text string, ok bool, err error) {
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return "", false, err
	}
	switch v := v.(type) {
	case nil:
		return "", false, nil
	case string:
		return v, true, nil
	case bool, float64:
		return string(raw), true, nil
	case []any:
		words := make([]string, len(v))
		for i := range v {
			word, ok := v[i].(string)
			if !ok {
				return "", false, fmt.Errorf("is a list, and should be a list of strings")
			}
			words[i] = word
		}
		return strings.Join(words, " "), true, nil
	}
	return "", false, fmt.Errorf("is an object, and should be a boolean, a number, a string or a list")
}

func fromVariables(level Level, vars map[string]string) (Layer, error) {
	l := Layer{Level: level, Values: map[string]string{}, Variables: map[string]string{}, Tags: map[string]string{}}
	names := slices.Sorted(maps.Keys(vars))
	for _, prefix := range prefixes {
		for _, variable := range names {
			rest, ok := strings.CutPrefix(variable, prefix)
			if !ok {
				continue
			}
			if err := l.add(variable, rest, vars[variable]); err != nil {
				return Layer{}, err
			}
		}
	}
	return l, nil
}

// add takes one variable; rest is its name behind the prefix.
func (l *Layer) add(variable, rest, text string) error {
	if tag, ok := strings.CutPrefix(rest, tagWord); ok {
		return l.addTag(variable, tag, text)
	}
	s, ok := byVariable[rest]
	if !ok {
		l.Unknown = append(l.Unknown, clip(printable(variable)))
		return nil
	}
	text = strings.TrimSpace(text)
	if text == "" && !s.value.isFlag() && !s.value.isList() {
		return nil // not set
	}
	if _, ok := l.Values[s.Name]; !ok {
		l.Values[s.Name], l.Variables[s.Name] = text, variable
	}
	return nil
}

// addTag takes one tag.
func (l *Layer) addTag(variable, name, text string) error {
	if _, ok := l.Tags[name]; ok {
		return nil
	}
	var err error
	switch {
	case name == "" || len(name) > maxTagName || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(",:=", r) }):
		err = fmt.Errorf("is no name of a tag: it has 1 to %d characters without comma, colon and equals sign", maxTagName)
	case len(text) > maxTagValue:
		err = fmt.Errorf("is longer than %d bytes", maxTagValue)
	case len(l.Tags) == maxTags:
		err = fmt.Errorf("is more than the %d tags that there may be", maxTags)
	}
	if err != nil {
		return &Error{Setting: "tag", Variable: clip(printable(variable)), Err: err}
	}
	l.Tags[name] = printable(text)
	return nil
}

// printable keeps control characters out of what is shown.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return '?'
		}
		return r
	}, s)
}
