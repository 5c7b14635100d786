// Text to programs: statements, operands, scopes, labels; the module around the functions.
#include <cctype>
#include <cstdio>
#include <cstdlib>

#include "../runtime/state.hpp"
#include "program.hpp"

namespace emu::ptx {
namespace {
constexpr int kFirstRegister = 1 << 24;              // until the number of constants is known

bool word(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%'; }
const char* skip_space(const char* c) {
    for (;;) {
        while (isspace((unsigned char)*c)) ++c;
        if (c[0] == '/' && c[1] == '/') { while (*c && *c != '\n') ++c; continue; }
        return c;
    }
}
}  // namespace

std::vector<Str> split(const Str& s, char by) {
    std::vector<Str> out;
    int depth = 0;
    Str cur;
    for (char ch : s) {
        if (ch == '{' || ch == '[' || ch == '(') ++depth;
        if (ch == '}' || ch == ']' || ch == ')') --depth;
        if (ch == by && !depth) { out.push_back(cur); cur.clear(); }
        else if (!isspace((unsigned char)ch)) cur += ch;
    }
    if (!cur.empty()) out.push_back(cur);
    return out;
}
int width(const Str& t) {
    if (t == "pred") return 1;
    if (t.size() < 2 || !strchr("bsuf", t[0])) return 0;
    int bits = atoi(t.c_str() + 1);
    return bits == 8 || bits == 16 || bits == 32 || bits == 64 ? bits / 8 : 0;
}
More& more(Ins& i) {
    if (!i.more) i.more = std::make_shared<More>();
    return *i.more;
}

Opcode::Opcode(const Str& s) : parts(split(s, '.')), taken(parts.size()), text(s) { taken[0] = true; }
bool Opcode::take(const char* part) {
    for (size_t k = 1; k < parts.size(); ++k) if (!taken[k] && parts[k] == part) { taken[k] = true; return true; }
    return false;
}
Str Opcode::take_last() {
    for (size_t k = parts.size(); k-- > 1;) if (!taken[k]) { taken[k] = true; return parts[k]; }
    return "";
}
bool Opcode::is(const char* begin) const { return text.rfind(begin, 0) == 0; }
bool Opcode::finished() const {
    for (bool t : taken) if (!t) return false;
    return true;
}

// ---- operands ----------------------------------------------------------------------------------------------------------
Str Parser::resolve(const Str& n) const {
    for (auto s = scopes.rbegin(); s != scopes.rend(); ++s) if (auto it = s->find(n); it != s->end()) return it->second;
    return n;
}
int Parser::value(Reg v) {
    auto [it, added] = constant.try_emplace(v, int(p.constants.size()));
    if (added) p.constants.push_back(v);
    return it->second;
}
int Parser::fresh() { return kFirstRegister + registers++; }
int Parser::slot(const Str& operand) {
    if (operand.empty()) { fail("an operand is missing"); return -1; }
    if (operand == "_") return fresh();
    const char* c = operand.c_str();
    if (isdigit((unsigned char)*c) || *c == '-') {
        if (*c == '0' && strchr("fFdD", c[1]) && c[1]) return value(strtoull(c + 2, nullptr, 16));
        return value(*c == '-' ? Reg(strtoll(c, nullptr, 0)) : strtoull(c, nullptr, 0));
    }
    if (operand == "WARP_SZ") return value(32);
    const Str name = resolve(operand);
    if (auto it = slots.find(name); it != slots.end()) return it->second;
    bool declared = name.find('#') != Str::npos;
    for (auto& [prefix, count] : ranges)
        if (count < 0 ? name == prefix : name.rfind(prefix, 0) == 0 && isdigit((unsigned char)name[prefix.size()]) && atoi(name.c_str() + prefix.size()) < count) declared = true;
    if (declared) return slots[name] = fresh();
    if (auto it = symbols->find(name); it != symbols->end()) return value(it->second);
    fail("`" + operand + "` is neither a register nor a number nor a variable that is emulated");
    return -1;
}
int Parser::predicate(const Str& operand, bool& negate) {
    negate = !operand.empty() && operand[0] == '!';
    return slot(operand.substr(negate));
}
std::vector<int> Parser::list(const Str& s) {
    std::vector<int> v;
    if (s.size() < 2 || s[0] != '{') { fail("`" + s + "` is no list"); return v; }
    for (auto& x : split(s.substr(1, s.size() - 2), ',')) v.push_back(slot(x));
    return v;
}
std::vector<int> Parser::vector(const Str& s) { return !s.empty() && s[0] == '{' ? list(s) : std::vector<int>{slot(s)}; }
void Parser::address(Ins& i, const Str& s, int& base) {
    if (s.size() < 2 || s[0] != '[') { fail("`" + s + "` is no address"); return; }
    auto parts = split(s.substr(1, s.size() - 2), ',');
    auto plus = parts[0].find('+');
    if (plus != Str::npos) i.off += strtoll(parts[0].c_str() + plus + 1, nullptr, 0);
    base = slot(parts[0].substr(0, plus));
    if (parts.size() > 1) more(i).v0 = list(parts[1]);
    if (parts.size() > 2) fail("`" + s + "`");
}
int Parser::plain_address(const Str& s) {
    Ins i;
    int base = -1;
    address(i, s, base);
    if (i.off || i.more) fail("`" + s + "`: an offset");
    return base;
}
bool Parser::local_variable(const Str& s, const Variable** v, int64_t& offset) const {
    bool brackets = s[0] == '[';
    Str inside = brackets ? s.substr(1, s.size() - 2) : s;
    auto plus = inside.find('+');
    auto it = p.variables.find(resolve(inside.substr(0, plus)));
    if (it == p.variables.end()) return false;
    *v = &it->second;
    offset = it->second.offset + (plus == Str::npos ? 0 : strtoll(inside.c_str() + plus + 1, nullptr, 0));
    return true;
}

namespace {
// ---- declarations ------------------------------------------------------------------------------------------------------
// .param .align 8 .b8 name[584], .param .u64 .ptr .global name, .local .align 16 .b8 name[32]
bool declaration(const Str& text, Str& name, int& bytes, int& align) {
    bytes = align = 0;
    bool align_next = false;
    Str last, word;
    auto end_word = [&] {
        if (word.empty()) return;
        if (align_next) { align = atoi(word.c_str()); align_next = false; }
        else if (word == ".align") align_next = true;
        else if (word[0] == '.') { if (int w = width(word.substr(1))) bytes = w; }
        else last = word;
        word.clear();
    };
    for (char c : text) if (isspace((unsigned char)c)) end_word(); else word += c;
    end_word();
    auto bracket = last.find('[');
    name = last.substr(0, bracket);
    align = std::max(align, bytes);
    if (bracket != Str::npos) bytes *= atoi(last.c_str() + bracket + 1);
    return bytes > 0 && !name.empty();
}
bool add_variable(Program& p, const Str& key, const Str& text) {
    Str name;
    int bytes, align;
    if (!declaration(text, name, bytes, align)) return false;
    p.block_bytes = (p.block_bytes + align - 1) / align * align;
    p.variables[key.empty() ? name : key] = {p.block_bytes, bytes};
    p.block_bytes += bytes;
    return true;
}
bool declare(Parser& P, const Str& statement) {
    std::map<Str, Str>* scope = P.scopes.size() > 1 ? &P.scopes.back() : nullptr;
    auto own_name = [&](const Str& n) { return scope ? (*scope)[n] = n + "#" + std::to_string(P.scope_count) : n; };
    if (statement.rfind(".reg", 0) == 0) {
        size_t type = statement.find('.', 4), names = statement.find_first_of(" \t", type);
        for (auto& n : split(statement.substr(names), ',')) {
            auto angle = n.find('<');
            if (angle != Str::npos) P.ranges.push_back({n.substr(0, angle), atoi(n.c_str() + angle + 1)});
            else if (scope) own_name(n);
            else P.ranges.push_back({n, -1});
        }
        return true;
    }
    if (statement.rfind(".param", 0) == 0) {                       // an argument or result of a call
        Str name;
        int bytes, align;
        if (!declaration(statement, name, bytes, align)) return false;
        return add_variable(P.p, own_name(name), statement);
    }
    if (statement.rfind(".local", 0) == 0) {
        Str name;
        int bytes, align;
        if (!declaration(statement, name, bytes, align)) return false;
        P.p.local_bytes = (P.p.local_bytes + align - 1) / align * align;
        P.locals[name] = P.p.local_bytes;
        P.p.local_bytes += bytes;
        return true;
    }
    return statement.rfind(".pragma", 0) == 0;
}

// ---- functions ---------------------------------------------------------------------------------------------------------
struct Module {
    std::map<int, const char*> files;
    std::map<Str, Reg> symbols;
    std::vector<std::unique_ptr<Program>> programs;
};

Site location(const Module& m, const Str& line, Site before) {
    int f, l, column;
    if (sscanf(line.c_str(), ".loc %d %d %d", &f, &l, &column) != 3) return before;
    auto name = [&](int file) { auto it = m.files.find(file); return it == m.files.end() ? "ptx" : it->second; };
    if (l == 0) return before;                                     // the compiler's own
    Site at{name(f), l};
    auto in = line.find("inlined_at ");                            // a wrapper of kernels/prim: its caller is meant
    if (in != Str::npos && strstr(at.file, "/prim/") && sscanf(line.c_str() + in, "inlined_at %d %d", &f, &l) == 2) at = {name(f), l};
    return at;
}

bool statement(Parser& P, const Str& text, Site at) {
    if (text[0] == '.') {
        auto used = text.find("used_bytes_mask");
        if (used != Str::npos) P.used = strtoull(text.c_str() + used + strlen("used_bytes_mask"), nullptr, 10);
        if (!declare(P, text)) P.fail("a directive that is not known");
        return P.error.empty();
    }
    Ins i;
    i.at = at;
    size_t pos = 0;
    if (text[0] == '@') {
        pos = text.find_first_of(" \t");
        i.pred = P.predicate(text.substr(1, pos - 1), i.negate);
        pos = text.find_first_not_of(" \t", pos);
    }
    size_t space = text.find_first_of(" \t\n", pos);
    Opcode op(text.substr(pos, space == Str::npos ? Str::npos : space - pos));
    Operands operands = space == Str::npos ? Operands{} : split(text.substr(space), ',');
    const uint64_t used = P.used;
    bool known = decode_memory(P, i, op, operands) || decode_warp(P, i, op, operands) || decode_async(P, i, op, operands) ||
                 decode_copy(P, i, op, operands) || decode_cluster(P, i, op, operands) || decode_convert(P, i, op, operands) || decode_arithmetic(P, i, op, operands);
    if (used == P.used) P.used = ~0ull;
    if (!known || !i.exec) P.fail("an instruction that is not known");
    else if (!op.finished()) P.fail("a modifier that is not known");
    P.p.code.push_back(std::move(i));
    return P.error.empty();
}

// Labels of a nested block are its own.
void collect_labels(Parser& P, const char* c) {
    int depth = 1;
    for (const char* q = c; depth && *q; ++q) {
        if (*q == '{') ++depth;
        if (*q == '}') --depth;
        if (*q != ':' || q[1] == ':' || q[-1] == ':' || depth != 1) continue;
        const char* b = q;
        while (word(b[-1])) --b;
        P.scopes.back()[Str(b, q)] = Str(b, q) + "#" + std::to_string(P.scope_count);
    }
}

const char* body(Module& m, Parser& P, const char* c) {
    Site at{"", 0};
    auto fail = [&](const Str& text) {
        fprintf(stderr, "ptx: %s (%s:%d): cannot run `%s`: %s\n", P.p.name.c_str(), at.file, at.line, text.c_str(), P.error.c_str());
        P.p.broken = true;
        P.error.clear();
    };
    P.scopes.resize(1);
    for (int depth = 1; depth && *c;) {
        c = skip_space(c);
        if (*c == '{') { ++depth; ++c; P.scopes.emplace_back(); ++P.scope_count; collect_labels(P, c); continue; }
        if (*c == '}') { --depth; ++c; if (depth) P.scopes.pop_back(); continue; }
        if (!strncmp(c, ".loc", 4) && isspace((unsigned char)c[4])) {
            const char* end = strchr(c, '\n');
            at = location(m, Str(c, end), at);
            c = end;
            continue;
        }
        const char* e = c;
        bool quoted = false;
        for (int braces = 0; *e; ++e) {
            if (*e == '"') quoted = !quoted;
            if (quoted) continue;
            braces += (*e == '{') - (*e == '}');
            if (*e == ';' || (*e == ':' && !braces && e[1] != ':' && e[-1] != ':')) break;
        }
        Str text(c, e);
        while (!text.empty() && isspace((unsigned char)text.back())) text.pop_back();
        c = e + 1;
        if (text.empty()) continue;
        if (*e == ':') {
            const char* next = skip_space(c);
            Str label = P.resolve(text);
            if (!strncmp(next, ".branchtargets", 14)) {
                const char* end = strchr(next, ';');
                for (auto& l : split(Str(next + 14, end), ',')) P.tables[text].push_back(P.resolve(l));
                c = end + 1;
            } else P.labels[label] = int(P.p.code.size());
            continue;
        }
        if (!statement(P, text, at)) fail(text);
    }
    return c;
}

// Registers behind the constants; labels to places.
bool finish(Parser& P) {
    Program& p = P.p;
    const int first = int(p.constants.size());
    p.registers = first + P.registers;
    auto fix = [&](int& s) { if (s >= kFirstRegister) s += first - kFirstRegister; };
    for (auto& i : p.code) {
        for (int* s : {&i.pred, &i.d, &i.a, &i.b, &i.c, &i.e}) fix(*s);
        if (!i.more) continue;
        for (auto* v : {&i.more->v0, &i.more->v1, &i.more->v2, &i.more->v3}) for (int& s : *v) fix(s);
        for (auto& l : i.more->labels) {
            auto it = P.labels.find(l);
            if (it == P.labels.end()) { fprintf(stderr, "ptx: %s: no label %s\n", p.name.c_str(), l.c_str()); return false; }
            i.more->targets.push_back(it->second);
        }
        if (!i.more->targets.empty()) i.target = i.more->targets[0];
    }
    Ins last;
    last.exec = RUN { t.done = true; };
    p.code.push_back(last);
    return true;
}

dim3 directive(const char* begin, const char* end, const char* name) {    // its numbers; 0 without it
    const char* at = strstr(begin, name);
    if (!at || at >= end) return dim3(0, 0, 0);
    unsigned numbers[3] = {1, 1, 1};
    at += strlen(name);
    for (unsigned& n : numbers) {
        while (*at == ' ' || *at == ',') ++at;
        if (!isdigit((unsigned char)*at)) break;
        n = unsigned(strtoul(at, const_cast<char**>(&at), 10));
    }
    return dim3(numbers[0], numbers[1], numbers[2]);
}
int product(dim3 d) { return int(d.x * d.y * d.z); }

// `.func (.param .b32 r) name(.param .b64 a) {`, `.visible .entry name(...)  .maxntid 1, 2, 3 {`; a declaration ends with `;`.
const char* function(Module& m, const char* c, bool entry) {
    Parser P;
    P.symbols = &m.symbols;
    P.p.entry = entry;
    auto parameters = [&](std::vector<Str>& names) {
        const char* close = strchr(c, ')');
        Str one;
        for (const char* q = c + 1; q <= close; ++q) {
            if (*q != ',' && q != close) { one += *q; continue; }
            Str name;
            int bytes, align;
            if (declaration(one, name, bytes, align)) { add_variable(P.p, name, one); names.push_back(name); }
            one.clear();
        }
        c = skip_space(close + 1);
    };
    c = skip_space(c);
    if (*c == '(') parameters(P.p.results);
    const char* name = c;
    while (word(*c)) ++c;
    P.p.name = Str(name, c);
    c = skip_space(c);
    if (*c == '(') parameters(P.p.parameters);
    const char *brace = strchr(c, '{'), *semicolon = strchr(c, ';');
    if (!brace || (semicolon && semicolon < brace)) return semicolon;
    P.p.max_threads = std::max(product(directive(c, brace, ".maxntid")), product(directive(c, brace, ".reqntid")));
    P.p.min_blocks = product(directive(c, brace, ".minnctapersm"));
    P.p.cluster = directive(c, brace, ".reqnctapercluster");
    c = body(m, P, brace + 1);
    if (!finish(P)) P.p.broken = true;
    m.programs.push_back(std::make_unique<Program>(std::move(P.p)));
    return c;
}

void link(Module& m) {
    for (auto& p : m.programs)
        for (auto& i : p->code) {
            if (!i.more || i.more->call.name.empty()) continue;
            for (auto& q : m.programs) if (q->name == i.more->call.name && !q->broken) i.more->call.callee = q.get();
            if (i.more->call.callee) continue;
            fprintf(stderr, "ptx: %s calls %s, which cannot run\n", p->name.c_str(), i.more->call.name.c_str());
            p->broken = true;
        }
}

std::vector<std::unique_ptr<Program>>& programs() { static std::vector<std::unique_ptr<Program>> p; return p; }
bool locate_instruction(const void* pc, Site* s) {
    for (auto& p : programs())
        if (!p->code.empty() && pc >= &p->code.front() && pc <= &p->code.back()) { *s = static_cast<const Ins*>(pc)->at; return true; }
    return false;
}

// ---- running -----------------------------------------------------------------------------------------------------------
// Register files are kept: a register is written before it is read, and constants stay.
struct Registers {
    const Program& p;
    Reg* r;
    static inline std::mutex mutex;
    static std::vector<Reg*>& idle(const Program* p) {
        static std::map<const Program*, std::vector<Reg*>> all;
        return all[p];
    }
    explicit Registers(const Program& p) : p(p) {
        std::lock_guard<std::mutex> lock(mutex);
        auto& kept = idle(&p);
        if (!kept.empty()) { r = kept.back(); kept.pop_back(); return; }
        r = static_cast<Reg*>(calloc(size_t(p.registers) + 1, sizeof(Reg)));
        std::copy(p.constants.begin(), p.constants.end(), r);
    }
    ~Registers() {
        std::lock_guard<std::mutex> lock(mutex);
        idle(&p).push_back(r);
    }
};
constexpr int kAlign = 64;
char* aligned(char* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + kAlign - 1) & ~uintptr_t(kAlign - 1)); }

void launch(const Program& p, void** params) {
    Registers registers(p);
    char* memory = static_cast<char*>(__builtin_alloca(p.block_bytes + p.local_bytes + 2 * kAlign));
    char* block = aligned(memory);
    for (size_t k = 0; k < p.parameters.size(); ++k) {
        const Variable& v = p.variables.at(p.parameters[k]);
        std::memcpy(block + v.offset, params[k], v.bytes);
    }
    Thread t{registers.r, &p, block, aligned(block + p.block_bytes), 0, false, -1, false, {}};
    execute(t);
}
}  // namespace

void execute(Thread& t) {
    const Ins* code = t.p->code.data();
    while (!t.done) {
        const Ins& i = code[t.pc++];
        if (i.pred >= 0 && (t.r[i.pred] != 0) == i.negate) continue;
        i.exec(t, i);
    }
}

void call(Thread& caller, const Ins& i) {
    const Call& c = i.more->call;
    const Program& p = *c.callee;
    Registers registers(p);
    char* block = aligned(static_cast<char*>(__builtin_alloca(p.block_bytes + p.local_bytes + 2 * kAlign)));
    for (size_t k = 0; k < c.arguments.size(); ++k) {
        const Variable& v = p.variables.at(p.parameters[k]);
        std::memcpy(block + v.offset, caller.block + c.arguments[k], v.bytes);
    }
    Thread t{registers.r, &p, block, aligned(block + p.block_bytes), 0, false, -1, false, {}};
    execute(t);
    for (size_t k = 0; k < c.results.size(); ++k) {
        const Variable& v = p.variables.at(p.results[k]);
        std::memcpy(caller.block + c.results[k], block + v.offset, v.bytes);
    }
}

}  // namespace emu::ptx

namespace emu {

int load_ptx(const char* text) {
    using namespace ptx;
    static auto& kept = *new std::vector<std::unique_ptr<Str>>;    // reports name files as long as the process lives
    locate = locate_instruction;
    Module m;
    for (const char* s = text; (s = strstr(s, ".file")); ++s) {
        int n;
        char name[512];
        if (sscanf(s, ".file %d \"%511[^\"]\"", &n, name) != 2) continue;
        kept.push_back(std::make_unique<Str>(name));
        m.files[n] = kept.back()->c_str();
    }
    for (const char* s = text; (s = strstr(s, ".extern .shared")); ++s) {   // the block's dynamic shared memory; static is refused
        const char* end = strpbrk(s, "[;");
        const char* begin = end;
        while (end && word(begin[-1])) --begin;
        if (end) m.symbols[Str(begin, end)] = kSmemBase;
    }
    const char* c = text;
    while (*(c = skip_space(c))) {
        bool func = !strncmp(c, ".func", 5), entry = !strncmp(c, ".entry", 6);
        if (func || entry) {
            c = function(m, c + (func ? 5 : 6), entry);
            if (!c) return -1;
        } else if (*c == '{') {                                    // a debug section
            while (*c && *c != '}') ++c;
            c += *c != 0;
        } else if (*c == '"') {
            for (++c; *c && *c != '"'; ++c) {}
            c += *c != 0;
        } else if (isspace((unsigned char)*c)) ++c;
        else { while (*c && !isspace((unsigned char)*c) && *c != '{') ++c; }
    }
    link(m);
    int count = 0;
    for (auto& p : m.programs) {
        programs().push_back(std::move(p));
        const Program* program = programs().back().get();
        if (!program->entry || program->broken) continue;        // it has been said why
        std::vector<size_t> sizes;
        for (auto& name : program->parameters) sizes.push_back(size_t(program->variables.at(name).bytes));
        add_entry(program->name.c_str(), Entry{[program](void** params) { launch(*program, params); }, sizes, program->max_threads, program->min_blocks, program->cluster, 0, true});
        ++count;
    }
    return count;
}

}  // namespace emu
