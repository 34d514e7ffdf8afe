package server

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// maxCandidates is how many completions are listed.
const maxCandidates = 100

// complete completes the word before the cursor. Where several words fit it
// completes what they have in common, or lists them.
func (ss *session) complete(out io.Writer, line string, pos int) (string, int, bool) {
	before, after := line[:pos], line[pos:]
	words, err := splitWords(before)
	if err != nil {
		return "", 0, false // within quotes
	}
	word := ""
	if n := len(words); n > 0 && !strings.HasSuffix(before, " ") {
		word, words = words[n-1], words[:n-1]
	}
	fit := matching(ss.candidates(words, word), word)
	if len(fit) == 0 || !strings.HasSuffix(before, word) {
		return "", 0, false
	}
	more := commonPrefix(fit)[len(word):]
	switch {
	case len(fit) == 1:
		more += " "
	case more == "":
		list := fit[:min(len(fit), maxCandidates)]
		text := strings.Join(list, "  ")
		if n := len(fit) - len(list); n > 0 {
			text += fmt.Sprintf("  and %d more", n)
		}
		// The client may be gone.
		_, _ = io.WriteString(newCleanWriter(out, false), text+"\n")
	}
	return before + more + after, pos + len(more), true
}

// matching returns the candidates that begin with word and need no quotes,
// sorted.
func matching(candidates []string, word string) []string {
	fit := slices.DeleteFunc(candidates, func(c string) bool {
		return !strings.HasPrefix(c, word) || strings.ContainsAny(c, " \t\n'\"\\") || strings.ContainsFunc(c, isControl)
	})
	slices.Sort(fit)
	return slices.Compact(fit)
}

// candidates are the words that may follow words; word is how the next one
// begins.
func (ss *session) candidates(words []string, word string) []string {
	var list []string
	if len(words) < 2 {
		list = nextWords(words)
	}
	cmd, rest, err := (*apiCommand)(nil), words, error(nil)
	if len(words) > 0 {
		if cmd, rest, err = findCommand(words); err != nil {
			return list
		}
	}
	if cmd == nil || cmd.need != "" && !ss.Client.Can(cmd.need) {
		return list
	}
	c := &apiCall{Session: ss.Session, server: ss.server, callMode: callMode{text: true}}
	for i := 0; i < len(rest); i++ {
		f := cmd.flag(rest[i])
		switch {
		case f == nil:
			c.args = append(c.args, rest[i])
		case f.value != "":
			if i++; i == len(rest) {
				return flagValues(f)
			}
		}
	}
	if strings.HasPrefix(word, "-") {
		list = append(list, helpFlag.name)
		for _, f := range cmd.flags {
			list = append(list, f.name)
		}
		return list
	}
	if _, most := cmd.arity(); cmd.complete != nil && len(c.args) < most {
		list = append(list, cmd.complete(ss.ctx, c, append(slices.Clip(c.args), word))...)
	}
	return list
}

// nextWords returns the words that follow words in the names of commands.
func nextWords(words []string) (next []string) {
	done := strings.Join(append(slices.Clone(words), ""), " ")
	for _, cmd := range apiCommands() {
		if rest, ok := strings.CutPrefix(cmd.name, done); ok {
			first, _, _ := strings.Cut(rest, " ")
			next = append(next, first)
		}
	}
	return next
}

// flagValues returns what the value of a flag may be, as far as there is a
// list.
func flagValues(f *apiFlag) []string {
	switch f.name {
	case "--status":
		return slices.Clone(buildStatuses)
	case "--permissions":
		var list []string
		for _, p := range allPermissions {
			list = append(list, string(p))
		}
		return list
	}
	return nil
}

// commonPrefix returns what all of a sorted list begin with.
func commonPrefix(list []string) string {
	first, last := list[0], list[len(list)-1]
	n := 0
	for n < len(first) && n < len(last) && first[n] == last[n] {
		n++
	}
	return first[:n]
}
