package nixproto

import (
	"cmp"
	"strings"
)

// ParseName splits the name of a derivation into that of the package and its
// version: the version is what follows the first dash that no letter follows; ""
// if there is none. It is builtins.parseDrvName of the Nix language.
func ParseName(name string) (pkg, version string) {
	for i := 0; i+1 < len(name); i++ {
		if name[i] == '-' && !isLetter(name[i+1]) {
			return name[:i], name[i+1:]
		}
	}
	return name, ""
}

func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }
func isDigit(c byte) bool  { return '0' <= c && c <= '9' }

// nextComponent cuts the first component off a version: digits, or what is
// neither digit, dot nor dash. It is "" at the end.
func nextComponent(v string) (component, rest string) {
	v = strings.TrimLeft(v, ".-")
	n := 0
	for n < len(v) && v[n] != '.' && v[n] != '-' && isDigit(v[n]) == isDigit(v[0]) {
		n++
	}
	return v[:n], v[n:]
}

// CompareVersions orders versions as builtins.compareVersions of the Nix
// language does: component by component, numbers by value, "pre" before
// everything, other words before numbers.
func CompareVersions(a, b string) int {
	for a != "" || b != "" {
		var x, y string
		x, a = nextComponent(a)
		y, b = nextComponent(b)
		if c := compareComponents(x, y); c != 0 {
			return c
		}
	}
	return 0
}

func compareComponents(x, y string) int {
	switch {
	case x == y:
		return 0
	case isNumber(x) && isNumber(y):
		return compareNumbers(x, y)
	case x == "" && isNumber(y), x == "pre" && y != "pre":
		return -1
	case y == "" && isNumber(x), y == "pre":
		return 1
	case isNumber(y): // 2.3a is before 2.3.1
		return -1
	case isNumber(x):
		return 1
	}
	return cmp.Compare(x, y)
}

// isNumber reports whether a component, which is not mixed, is of digits.
func isNumber(c string) bool { return c != "" && isDigit(c[0]) }

// compareNumbers compares numbers of any length.
func compareNumbers(x, y string) int {
	x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
	return cmp.Or(cmp.Compare(len(x), len(y)), cmp.Compare(x, y))
}

// CommonComponents is how many components of two versions are the same, from the
// first one on.
func CommonComponents(a, b string) (n int) {
	for a != "" && b != "" {
		var x, y string
		x, a = nextComponent(a)
		y, b = nextComponent(b)
		if compareComponents(x, y) != 0 {
			return n
		}
		n++
	}
	return n
}
