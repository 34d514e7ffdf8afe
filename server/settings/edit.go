package settings

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// An Op is what is done to a stored value.
type Op uint8

// The operations.
const (
	Set Op = iota + 1
	Add
	Remove
	Reset
)

// A Change is one change of what a level has stored.
type Change struct {
	Name  string
	Op    Op
	Value string // not for Reset
	// Operator says that the operator asks, not the account.
	Operator bool
}

// Edit returns the values of a level after a change; values itself stays as it
// is. Inherited is what counts without the level: a list that is not set there
// is taken from it before an item is added or removed. Its error says in one
// sentence, for the one who asked, why nothing was changed.
func Edit(values map[string]string, inherited Effective, level Level, c Change) (map[string]string, error) {
	s, ok := Lookup(c.Name)
	if !ok {
		return nil, fmt.Errorf("there is no setting %q", clip(printable(c.Name)))
	}
	fail := func(err error) (map[string]string, error) { return nil, &Error{Setting: s.Name, Err: err} }
	if s.Scope == OperatorOnly && !c.Operator {
		return fail(errors.New("can be set by the operator only"))
	}
	if err := s.allowed(level, true); err != nil {
		return fail(err)
	}
	if inherited.IsZero() {
		inherited = Defaults()
	}
	text, err := s.edited(values, &inherited, level, c)
	if err != nil {
		return fail(err)
	}
	edited := maps.Clone(values)
	if edited == nil {
		edited = map[string]string{}
	}
	delete(edited, s.Name)
	if c.Op != Reset {
		edited[s.Name] = text
	}
	return edited, nil
}

// edited returns the new text of the setting.
func (s *Setting) edited(values map[string]string, inherited *Effective, level Level, c Change) (string, error) {
	if c.Op == Reset {
		return "", nil
	}
	if level >= Account && !c.Operator {
		if err := s.checkRemote(c.Value); err != nil {
			return "", err
		}
	}
	text := strings.TrimSpace(c.Value)
	if c.Op != Set {
		if !s.IsList() {
			return "", errors.New("is no list; use --set")
		}
		current := Items(s.current(values, inherited, level))
		if len(Items(text)) == 0 {
			return "", errors.New("needs an item to add or remove")
		}
		var err error
		if current, err = s.editItems(current, c.Op, Items(text)); err != nil {
			return "", err
		}
		text = strings.Join(current, " ")
	}
	scratch := Defaults()
	if err := s.value.set(&scratch, text); err != nil {
		return "", err
	}
	return s.value.raw(&scratch), nil
}

// current returns the text of the level, or else of those before it. Paths of the
// host that the system lists are not taken along: they stay where they are.
func (s *Setting) current(values map[string]string, inherited *Effective, level Level) string {
	if text, ok := values[s.Name]; ok {
		return text
	}
	items := Items(s.value.raw(inherited))
	if _, ok := s.value.(list[URL]); ok && level > System {
		items = slices.DeleteFunc(items, isLocal)
	}
	return strings.Join(items, " ")
}

// editItems adds or removes items of a list.
func (s *Setting) editItems(list []string, op Op, items []string) ([]string, error) {
	for _, item := range items {
		if op == Add {
			if s.Name == "access-tokens" { // one for each host
				host, _, _ := strings.Cut(item, "=")
				list = slices.DeleteFunc(list, func(have string) bool { return strings.HasPrefix(have, host+"=") })
			}
			if !slices.Contains(list, item) {
				list = append(list, item)
			}
			continue
		}
		before := len(list)
		list = slices.DeleteFunc(list, func(have string) bool { return s.isItem(have, item) })
		if len(list) == before {
			return nil, errors.New("has no such item")
		}
	}
	return list, nil
}

// isItem reports whether text names an item: as it was set, as it is shown, or by
// the name of a key or host before its colon or equals sign.
func (s *Setting) isItem(have, text string) bool {
	if have == text {
		return true
	}
	switch s.Name {
	case "trusted-public-keys", "offer-signed":
		name, _, _ := strings.Cut(have, ":")
		return name == text
	case "access-tokens":
		host, _, _ := strings.Cut(have, "=")
		return host == text || host+"="+hidden == text
	case "caches", "substituters":
		return URL{have}.String() == text
	}
	return false
}
